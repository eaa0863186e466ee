"""A server that the benchmark starts, watches and ends: its start-up time, its memory, and other load."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from headwater.bench.machine import ForeignLoad, process_tree, rss_mib
from load_client import Target


class ServerProcess:
    """A server in its own session. `pause` stops it while another server is measured."""

    def __init__(
        self, command: str, *, environment: dict[str, str], model: str, extra: dict, log: Path
    ) -> None:
        """Start `command`, in which `{port}` stands for the port to listen on."""
        port = _free_port()
        self.argv = shlex.split(command.replace("{port}", str(port)))
        self.target = Target(f"http://127.0.0.1:{port}", model, extra)
        self.log = log
        self.start_s = 0.0
        self.peak_rss_mib = 0.0
        self._started = time.perf_counter()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._ended = threading.Event()
        threading.Thread(target=self._watch_memory, daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def wait_until_answering(self, limit_s: float) -> None:
        """Wait for the first chat answer. Raises `RuntimeError` if the server ends or takes longer."""
        body = {
            "model": self.target.model,
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 1,
            "temperature": 0,
        }
        while True:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with {self._process.returncode}; see {self.log}")
            if time.perf_counter() - self._started > limit_s:
                raise RuntimeError(f"the server did not answer within {limit_s:g} s; see {self.log}")
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.post(
                    self.target.url + "/v1/chat/completions", json=body, timeout=limit_s, trust_env=False
                )
                if answer.status_code == 200:
                    break
                if answer.status_code not in (404, 503):
                    raise RuntimeError(f"the server answered {answer.status_code}: {answer.text[:300]}")
            time.sleep(0.1)
        self.start_s = time.perf_counter() - self._started

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the server and all it started."""
        self._ended.set()
        for number, wait_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                self.resume()
                os.killpg(self._process.pid, number)
                self._process.wait(wait_s)

    @contextlib.contextmanager
    def foreign_work(self, record: dict) -> Iterator[None]:
        """Record in `record["foreign_cores"]` the number of cores used by other processes."""
        load = ForeignLoad(process_tree(self._process.pid))
        yield
        record["foreign_cores"] = load.cores()

    def _watch_memory(self) -> None:
        while not self._ended.wait(0.5):
            now_mib = sum(rss_mib(pid) for pid in process_tree(self._process.pid))
            self.peak_rss_mib = max(self.peak_rss_mib, now_mib)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
