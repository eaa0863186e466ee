"""A short benchmarks/soak.py: mixed load with aborts and disconnects loses no request and no page."""

import asyncio
import sys
from pathlib import Path

import pytest
from running_server import RunningServer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("default server")]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_mixed_load_loses_nothing(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # soak adds its folders
    import soak

    outcome = asyncio.run(soak.soak(server.url, num_streams=32, seconds=3, seed=1))
    assert outcome.failures == []
    assert outcome.num_requests >= 32
    assert set(outcome.counts) == {"short", "streamed", "long", "aborted", "left", "wrong"}
