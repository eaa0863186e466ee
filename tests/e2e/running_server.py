"""A `headwater serve` in processes of its own, for tests: started on a free port, always ended."""

import os
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from headwater.bench.machine import children_of, command_of
from processes import held_port, number_of

START_LIMIT_S = 120.0
# httpx would read all certificates of the system for every request to an http:// address, which takes 26 ms
_PLAIN: dict[str, Any] = {"trust_env": False, "verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}


class RunningServer:
    """Starts `headwater serve` with these arguments; a context manager that leaves nothing behind.

    Its temporary files go to `temporary`, a folder of its own, where tests look for leftover sockets.
    """

    def __init__(self, *arguments: str) -> None:
        self._port = held_port()
        port = number_of(self._port)
        self.url = f"http://127.0.0.1:{port}"
        self._folder = tempfile.TemporaryDirectory(prefix="hw-test-")
        self.temporary = Path(self._folder.name) / "t"
        self.temporary.mkdir()
        self._log = (Path(self._folder.name) / "log").open("w+")
        patient = ("--header-timeout", "120")  # a test that reads 64 streams on a busy machine is late with its own
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headwater", "serve", "--port", str(port), *patient, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        """All the server has printed so far."""
        return Path(self._log.name).read_text()

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **_PLAIN)

    def post(self, path: str, **options: object) -> httpx.Response:
        return httpx.post(self.url + path, timeout=120, **_PLAIN, **options)  # type: ignore[arg-type]

    def put(self, path: str, **options: object) -> httpx.Response:
        return httpx.put(self.url + path, timeout=60, **_PLAIN, **options)  # type: ignore[arg-type]

    def delete(self, path: str) -> httpx.Response:
        return httpx.delete(self.url + path, timeout=60, **_PLAIN)

    def health(self) -> int | None:
        """The status of /health; None when the port does not answer."""
        try:
            return self.get("/health").status_code
        except httpx.TransportError:
            return None

    def wait_healthy(self) -> "RunningServer":
        deadline = time.monotonic() + START_LIMIT_S
        while self.health() != 200:
            assert self.process.poll() is None, f"the server ended:\n{self.log}"
            assert time.monotonic() < deadline, f"the server is not healthy:\n{self.log}"
            time.sleep(0.1)
        return self

    def wait_exit(self, limit_s: float) -> int:
        return self.process.wait(limit_s)

    def children(self) -> list[int]:
        """Process ids of what the server has started: the engine, and what checks grammars."""
        return children_of(self.process.pid)

    def engine_pid(self) -> int:
        (pid,) = self.engine_pids()
        return pid

    def engine_pids(self) -> list[int]:
        """Those of them that run an engine."""
        return [pid for pid in self.children() if "headwater.server.engine_process" in command_of(pid)]

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(60)
        self._log.close()
        self._port.close()
        self._folder.cleanup()
