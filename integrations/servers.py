"""The servers that clients are run against: started here on free ports of 127.0.0.1 and always ended.

| name | what it is |
|---|---|
| `model` | `headwater serve`, the default model; or the running server that `HEADWATER_URL` names |
| `second` | another one of the same model, for gateways |
| `scripted` | the same HTTP routes in front of a scripted engine (scripted_server.py), for answers that need wit |
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

from checks import URL_VARIABLES

ROOT = Path(__file__).parents[1]
START_LIMIT_S = 180.0
STOP_LIMIT_S = 15.0


class ServerError(Exception):
    """A server did not start; the message has the end of its log."""


class ServerProcess:
    """One server in processes of its own. Use it as a context manager."""

    def __init__(self, *command: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        path = [str(ROOT / folder) for folder in ("src", "tests", "integrations")]
        path += filter(None, [os.environ.get("PYTHONPATH")])  # where packages lie, if not in this environment
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, *command, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,
        )

    def wait_healthy(self) -> "ServerProcess":
        """Wait until /health answers 200. Raises ServerError."""
        deadline_s = time.monotonic() + START_LIMIT_S
        while not is_healthy(self.url):
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise ServerError(f"{self.url} is not healthy: {self.end_of_log()}")
            time.sleep(0.2)
        return self

    def end_of_log(self, num_lines: int = 12) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-num_lines:])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._log.close()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.stop()


COMMANDS = {
    "model": ("-m", "headwater", "serve"),
    "second": ("-m", "headwater", "serve"),
    "scripted": ("integrations/scripted_server.py",),
}


class Servers:
    """Starts each kind of server when a client first needs it, and keeps it for the next client."""

    def __init__(self) -> None:
        self._processes: dict[str, ServerProcess] = {}

    def variables(self, names: tuple[str, ...]) -> dict[str, str]:
        """Environment variables with the URLs of these servers, which run and are healthy."""
        return {URL_VARIABLES[name]: self._url(name) for name in names}

    def _url(self, name: str) -> str:
        if given := os.environ.get(URL_VARIABLES[name]):
            return given.rstrip("/")
        if name in self._processes and not is_healthy(self._processes[name].url):
            self._processes.pop(name).stop()  # a client before has brought it down; the next one is not to suffer
        if name not in self._processes:
            events = () if name == "scripted" else ("--kv-events-endpoint", f"tcp://127.0.0.1:{free_port()}")
            self._processes[name] = ServerProcess(*COMMANDS[name], *events)
            self._processes[name].wait_healthy()
        return self._processes[name].url

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for process in self._processes.values():
            process.stop()


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
