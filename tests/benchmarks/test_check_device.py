"""The list of tests that run on a GPU: a file that moved away would be left out there, where it matters."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_listed_file_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import check_device

    assert [name for name in check_device.TESTS if not (ROOT / name).is_file()] == []
    sys.modules.pop("check_device", None)
