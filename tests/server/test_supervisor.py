"""The supervisor with small stand-in processes: an engine's end is always noticed, told and acted on."""

import asyncio
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from headwater.launch.config import ServerArgs
from headwater.launch.private_directory import private_directory
from headwater.server.engine_process import EngineStart
from headwater.server.supervisor import EngineExit, EngineProcess, EngineSupervisor

READ_START = (
    "import sys, time, os, signal\n"
    "from io import FileIO\n"
    "from headwater.messages.frames import pack_frame\n"
    "from headwater.server.engine_process import StartFailure, read_start\n"
    "start = read_start(FileIO(0, closefd=False))\n"
)


def engine_that(does: str) -> Sequence[str]:
    return (sys.executable, "-c", READ_START + does)


def end_of(tmp_path: Path, *, does: str) -> EngineExit:
    async def run() -> EngineExit:
        start = EngineStart(args=ServerArgs(model="m"), endpoint="ipc://x", directory=str(tmp_path))
        process = await EngineProcess.start(start, command=engine_that(does))
        return await asyncio.wait_for(process.wait(), 120)

    return asyncio.run(run())


def test_a_model_that_cannot_be_loaded_is_reported_in_the_engines_own_words(tmp_path: Path) -> None:
    end = end_of(tmp_path, does="os.write(1, pack_frame(StartFailure('no tensor named x'))); sys.exit(2)")
    assert end.was_refused
    assert end.reason == "no tensor named x"


def test_a_killed_engine_is_reported_with_its_signal(tmp_path: Path) -> None:
    end = end_of(tmp_path, does="os.kill(os.getpid(), signal.SIGKILL)")
    assert not end.was_refused
    assert end.reason == "the engine process was killed by SIGKILL"


def test_arguments_reach_the_engine_whole(tmp_path: Path) -> None:
    """A long argument does not fit one read of a pipe."""
    args = ServerArgs(model="m" * 300_000)

    async def run() -> EngineExit:
        start = EngineStart(args=args, endpoint="ipc://x", directory=str(tmp_path))
        process = await EngineProcess.start(
            start, command=engine_that("sys.exit(40 if len(start.args.model) == 300_000 else 41)")
        )
        return await asyncio.wait_for(process.wait(), 120)

    assert asyncio.run(run()).code == 40


def test_an_engine_that_dies_before_reading_its_arguments_is_just_an_exit(tmp_path: Path) -> None:
    async def run() -> EngineExit:
        start = EngineStart(args=ServerArgs(model="m" * 300_000), endpoint="ipc://x", directory=str(tmp_path))
        process = await EngineProcess.start(start, command=(sys.executable, "-c", "raise SystemExit(7)"))
        return await asyncio.wait_for(process.wait(), 120)

    assert asyncio.run(run()).code == 7


def test_keys_do_not_show_in_the_process_list(tmp_path: Path) -> None:
    async def run() -> str:
        start = EngineStart(args=ServerArgs(api_key="hush-hush"), endpoint="ipc://x", directory=str(tmp_path))
        process = await EngineProcess.start(start, command=engine_that("time.sleep(60)"))
        shown = subprocess.run(["ps", "eww", "-p", str(process.pid)], capture_output=True, text=True, check=True).stdout
        await process.stop(grace_s=5.0)
        return shown

    shown = asyncio.run(run())
    assert "python" in shown
    assert "hush-hush" not in shown


@pytest.mark.parametrize(("restarts", "num_back"), [(0, 0), (2, 2)])
def test_a_crashing_engine_is_restarted_as_often_as_allowed(tmp_path: Path, restarts: int, num_back: int) -> None:
    gone: list[str] = []
    endpoints: list[str] = []

    async def run() -> EngineExit:
        supervisor = EngineSupervisor(
            ServerArgs(engine_restarts=restarts), directory=tmp_path, command=engine_that("sys.exit(3)")
        )
        endpoints.append(await supervisor.start())
        return await asyncio.wait_for(supervisor.run(on_gone=gone.append, on_back=endpoints.append), 30)

    assert asyncio.run(run()).code == 3
    assert gone == ["the engine process ended with exit code 3"] * (1 + num_back)
    assert len(set(endpoints)) == 1 + num_back, "a new engine must not bind where the old socket lies"


def test_a_refused_model_is_not_tried_again(tmp_path: Path) -> None:
    endpoints: list[str] = []

    async def run() -> EngineExit:
        supervisor = EngineSupervisor(
            ServerArgs(engine_restarts=5), directory=tmp_path, command=engine_that("sys.exit(2)")
        )
        await supervisor.start()
        return await asyncio.wait_for(supervisor.run(on_gone=lambda _: None, on_back=endpoints.append), 30)

    assert asyncio.run(run()).was_refused
    assert endpoints == []


def test_an_engine_whose_told_weights_are_gone_is_tried_again_while_others_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gets those that are told by then: the server goes on with the engines it has."""
    monkeypatch.setattr("headwater.server.supervisor.RETRY_S", 0.05)
    told = [("gone", "auto")]
    gone: list[str] = []
    others_serve = [True]

    def on_gone(reason: str) -> None:
        gone.append(reason)
        if len(gone) == 3:
            told[0] = ("here", "auto")

    async def run() -> EngineExit:
        body = (
            "first = Path(start.directory) / 'first'\n"
            "if not first.exists():\n    first.touch()\n    sys.exit(1)\n"
            "if start.weights[0] == 'gone':\n    sys.exit(2)\n"
            "Path(start.directory, 'loaded').touch()\n"
            "sys.exit(5)\n"
        )
        supervisor = EngineSupervisor(
            ServerArgs(engine_restarts=1), directory=tmp_path, command=engine_that("from pathlib import Path\n" + body)
        )
        supervisor.weights = lambda: told[0]
        supervisor.is_missed = lambda: not others_serve[0]
        await supervisor.start()
        return await asyncio.wait_for(supervisor.run(on_gone=on_gone, on_back=lambda _: None), 30)

    assert asyncio.run(run()).code == 5
    assert (tmp_path / "loaded").exists()
    assert len(gone) == 4, "a crash, two refusals, and the crash for which no restart was left"


def test_stop_kills_an_engine_that_ignores_sigterm(tmp_path: Path) -> None:
    gone: list[str] = []

    async def run() -> tuple[float, EngineExit]:
        stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(start.directory + '/up', 'w')\ntime.sleep(60)\n"
        supervisor = EngineSupervisor(ServerArgs(engine_restarts=5), directory=tmp_path, command=engine_that(stubborn))
        await supervisor.start()
        watching = asyncio.create_task(supervisor.run(on_gone=gone.append, on_back=gone.append))
        while not (tmp_path / "up").exists():
            await asyncio.sleep(0.02)
        before_s = time.monotonic()
        await supervisor.stop(grace_s=0.2)
        took_s = time.monotonic() - before_s
        return took_s, await asyncio.wait_for(watching, 20)

    took_s, end = asyncio.run(run())
    assert end.code == -signal.SIGKILL
    assert 0.2 <= took_s < 3
    assert gone == [], "an engine that was told to stop has not gone unexpectedly"


def test_the_engine_leaves_when_its_parent_dies_without_a_word(tmp_path: Path) -> None:
    """A parent killed with SIGKILL can clean up nothing: the engine must go, and take the sockets along."""
    directory = tmp_path / "private"
    directory.mkdir()
    (directory / "engine-0.sock").touch()
    orphan = (
        "import time\nfrom io import FileIO\nfrom pathlib import Path\n"
        "from headwater.launch.child_process import exit_with_parent\n"
        f"exit_with_parent(FileIO(0, closefd=False), Path({str(directory)!r}))\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", orphan], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.stdin.close()
        assert process.wait(60) == 1
    assert not directory.exists()


def test_the_private_directory_is_private_and_goes_away() -> None:
    with private_directory() as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "engine-0.sock").touch()
    assert not directory.exists()


def test_the_cores_of_its_threads_reach_an_engine(tmp_path: Path) -> None:
    async def run() -> EngineExit:
        command = engine_that("sys.exit(40 if start.cpus == ((0, 4), (1, 5)) else 41)")
        supervisor = EngineSupervisor(ServerArgs(model="m"), directory=tmp_path, cpus=((0, 4), (1, 5)), command=command)
        await supervisor.start()
        return await asyncio.wait_for(supervisor.run(on_gone=lambda _: None, on_back=lambda _: None), 20)

    assert asyncio.run(run()).code == 40
