"""Starts an engine process, notices its end, and restarts it while restarts are left."""

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from headwater.launch.child_process import EXIT_REFUSED
from headwater.launch.config import ServerArgs
from headwater.messages.frames import pack_frame
from headwater.server.engine_process import EngineStart, StartFailure

RETRY_S = 5.0  # after a refused start: the files may return, or an update may name others
ENGINE_COMMAND = (sys.executable, "-m", "headwater.server.engine_process")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineExit:
    """How an engine process ended. `code` is negative for a signal, as in `subprocess`."""

    code: int
    message: str | None = None  # the process's own report, if it failed to start

    @property
    def was_refused(self) -> bool:
        return self.code == EXIT_REFUSED

    @property
    def reason(self) -> str:
        if self.message is not None:
            return self.message
        if self.code < 0:
            return f"the engine process was killed by {signal.Signals(-self.code).name}"
        return f"the engine process ended with exit code {self.code}"


class EngineProcess:
    """One engine process. It ends when the pipe to its standard input is closed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls, start: EngineStart, *, command: Sequence[str] = ENGINE_COMMAND) -> "EngineProcess":
        """Run `command` and write `start` to its standard input."""
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            process_group=0,  # so that a terminal's Ctrl-C reaches only this process, which ends the engine in order
        )
        assert process.stdin is not None
        process.stdin.write(pack_frame(start))
        with contextlib.suppress(ConnectionError):  # it died immediately; `wait` reports it
            await process.stdin.drain()
        return cls(process)

    async def wait(self) -> EngineExit:
        """Wait for the process to end."""
        assert self._process.stdout is not None
        report = await self._process.stdout.read()
        code = await self._process.wait()
        if len(report) <= 4:
            return EngineExit(code)
        return EngineExit(code, msgspec.msgpack.decode(report[4:], type=StartFailure).message)

    async def stop(self, grace_s: float) -> None:
        """Send SIGTERM, and SIGKILL after `grace_s`. Returns when the process has ended."""
        for send in (self._process.terminate, self._process.kill):
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    send()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), grace_s)


class EngineSupervisor:
    """Keeps one engine running. Call `start`, then `run`, which returns when the engine has ended for good.

    `stop` may be called at any time.
    """

    def __init__(
        self,
        args: ServerArgs,
        *,
        directory: Path,
        index: int = 0,
        cpus: tuple[tuple[int, ...], ...] = (),
        rank_cpus: tuple[tuple[tuple[int, ...], ...], ...] = (),
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        """`args` are those of this engine, `index` is its number among the engines, `cpus` are those of its threads.

        `rank_cpus` are those of its other ranks' threads.
        """
        self._cpus = cpus
        self._rank_cpus = rank_cpus
        self.index = index
        self._args = args
        self._directory = directory
        self._command = command
        self._num_starts = 0
        self._num_restarts = 0
        self.weights: Callable[[], tuple[str, str] | None] = lambda: None  # to load instead of those in `args`
        self.is_missed: Callable[[], bool] = lambda: True  # no other engine serves: without this one the server ends
        self._process: EngineProcess | None = None
        self._is_stopping = False

    async def start(self) -> str:
        """Start an engine process without waiting for it to load. Returns the endpoint that it will listen at."""
        # a new name each time avoids stale sockets
        socket = self._directory / f"engine-{self.index}-{self._num_starts}.sock"
        self._num_starts += 1
        endpoint = f"ipc://{socket}"
        self._process = await EngineProcess.start(
            EngineStart(
                args=self._args,
                endpoint=endpoint,
                directory=str(self._directory),
                index=self.index,
                weights=self.weights(),
                cpus=self._cpus,
                rank_cpus=self._rank_cpus,
            ),
            command=self._command,
        )
        return endpoint

    async def run(self, *, on_gone: Callable[[str], None], on_back: Callable[[str], None]) -> EngineExit:
        """Restart the engine whenever it ends, as often as `--engine-restarts` allows; return its last end.

        A refused start (for example, the current weights are missing) is retried while other engines serve.

        `on_gone(reason)` is called when a process has ended, `on_back(endpoint)` when its successor begins to load.
        """
        while True:
            assert self._process is not None, "start() comes before run()"
            end = await self._process.wait()
            if not self._is_stopping:
                on_gone(end.reason)
            if self._is_stopping:
                return end
            if end.was_refused:
                if self._num_starts == 1 or self.is_missed():
                    return end
                log.warning("engine %d: %s; retrying in %.0f s", self.index, end.reason, RETRY_S)
                await asyncio.sleep(RETRY_S)
            else:
                self._num_restarts += 1
                if self._num_restarts > self._args.engine_restarts:
                    return end
                progress = f"{self._num_restarts} of {self._args.engine_restarts}"
                log.warning("engine %d: %s; restarting it (%s)", self.index, end.reason, progress)
            on_back(await self.start())
            if self._is_stopping:  # `stop` was called while the new process was being created
                await self._process.stop(grace_s=0.0)

    async def stop(self, grace_s: float) -> None:
        """End the engine process for good. Returns when it has ended, after two graces at most."""
        self._is_stopping = True
        if self._process is not None:
            await self._process.stop(grace_s)
