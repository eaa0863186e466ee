"""No spinning where cores are shared: what the OpenMP library that came with PyTorch was told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.launch.config import ServerArgs
from headwater.launch.openmp import sleeping_threads
from headwater.server.engine_process import EngineStart, pack_frame

PASSIVE, ACTIVE = "OMP_WAIT_POLICY = 'PASSIVE'", "OMP_WAIT_POLICY = 'ACTIVE'"


def _settings(*command: str, stdin: bytes = b"", **environment: str) -> str:
    """What the library says of itself when the command loads it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    with subprocess.Popen(
        [sys.executable, *command],
        env=inherited | {"OMP_DISPLAY_ENV": "TRUE"} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(stdin)
        process.stdin.flush()  # and left open: an engine process ends with it
        shown = process.stderr.read().decode()
    if "OPENMP DISPLAY ENVIRONMENT" not in shown:
        pytest.skip(f"this PyTorch computes without OpenMP: {shown[-500:]}")
    return shown


@pytest.mark.slow
def test_threads_of_an_engine_process_sleep_while_they_wait(tmp_path: Path) -> None:
    """Two spinning threads on two busy cores gave 0.4 tokens/s where sleeping ones give eight."""
    args = ServerArgs(model=str(tmp_path / "no such folder"))
    start = pack_frame(EngineStart(args=args, endpoint="ipc:///unused", directory=str(tmp_path)))
    command = ("-m", "headwater.server.engine_process")
    assert PASSIVE in _settings(*command, stdin=start)
    assert ACTIVE in _settings(*command, stdin=start, OMP_WAIT_POLICY="ACTIVE")


@pytest.mark.slow
def test_threads_of_the_python_engine_sleep_and_its_user_keeps_the_environment() -> None:
    code = "import os; from headwater import Engine; assert 'OMP_WAIT_POLICY' not in os.environ, 'it is set'"
    shown = _settings("-c", code)
    assert PASSIVE in shown
    assert "it is set" not in shown


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with sleeping_threads():
        assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
