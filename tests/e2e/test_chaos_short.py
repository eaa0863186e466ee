"""A short benchmarks/chaos.py with tiny models: two engines, random operators, kill -9; no wrong text, nothing lost."""

import asyncio
import sys
from pathlib import Path

import pytest
from running_server import RunningServer

pytestmark = [pytest.mark.slow, pytest.mark.load]

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.timeout(600)
def test_no_wrong_text_and_nothing_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", list(sys.path))  # chaos adds a folder
    import chaos

    checkpoints = chaos.make_checkpoints(None, tmp_path, seed=1)
    flags = chaos.serve_flags(checkpoints[chaos.FIRST], num_tokens=4096)
    with RunningServer(*flags) as server:
        server.wait_healthy()
        outcome = asyncio.run(
            chaos.chaos(
                server.url,
                server_pid=server.process.pid,
                checkpoints=checkpoints,
                store=tmp_path / "store",
                seconds=5,
                seed=1,
                num_clients=12,
                num_kills=1,
            )
        )
        log = server.log
    assert outcome.failures == [], f"{outcome.requests}, {outcome.operations}\n{log[-4000:]}"
    assert outcome.requests["complete"] > 0
    assert outcome.operations["kill -9"] == 1
    assert "Traceback" not in log
