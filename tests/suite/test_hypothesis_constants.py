"""The shortcut for Hypothesis's constants works, and a version without it only loses the shortcut."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from suite.hypothesis_constants import keep_constants

PATHS = [Path(__file__).with_name("hypothesis_constants.py")] * 2


def test_constants_are_kept_with_the_version_that_is_pinned() -> None:
    assert keep_constants(PATHS) == 2


def test_another_version_only_loses_the_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("constants_ast")
    monkeypatch.setitem(sys.modules, "hypothesis.internal.constants_ast", other)
    assert keep_constants(PATHS) == 0
    other.__dict__["constants_from_module"] = lambda: None  # takes other arguments
    assert keep_constants(PATHS) == 0
    monkeypatch.setitem(sys.modules, "hypothesis.internal.constants_ast", None)
    assert keep_constants(PATHS) == 0
