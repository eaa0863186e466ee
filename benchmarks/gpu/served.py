"""A server in a process of its own, and clients that stream from it with the client of `headwater bench`."""

import json
import math
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.bench.apis import APIS, Settings
from headwater.bench.connection import ConnectionBroke, HttpClient
from headwater.bench.event_stream import EventTimes
from headwater.bench.machine import children_of, command_of, cpu_s


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PORT = _free_port()  # of this process and of those that it forks
START_LIMIT_S = 180.0
ANSWER_LIMIT_S = 3600.0
MODEL_NAME = "random"


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers."""

    start_s: float  # from its start to its first answer
    pid: int  # of the API process

    def api_cpu_s(self) -> float:
        """Seconds of a core that the API process has used, in user and kernel."""
        return cpu_s(self.pid)

    def receiving_cpu_s(self) -> float:
        """The same of the API process and its processes that receive a trainer's tensors."""
        own = [child for child in children_of(self.pid) if "headwater.launch.receiving.process" in command_of(child)]
        return sum(map(cpu_s, [self.pid, *own]))


@contextmanager
def serve(
    folder: Path, *, device: str, load_format: str = "dummy", context_length: int = 8192, options: Sequence[str] = ()
) -> Iterator[Served]:
    """`headwater serve`, with random weights unless `load_format` says otherwise."""
    command = [sys.executable, "-m", "headwater", "serve", "--model", str(folder), "--load-format", load_format]
    command += ["--served-model-name", MODEL_NAME, "--device", device, "--context-length", str(context_length)]
    command += ["--port", str(PORT)]
    command += options
    if _answers():
        raise RuntimeError(f"another server answers on port {PORT}")
    started_s = time.perf_counter()
    server = subprocess.Popen(command)
    try:
        while not _answers():
            if server.poll() is not None or time.perf_counter() - started_s > START_LIMIT_S:
                raise TimeoutError("the server did not start")
            time.sleep(0.2)
        yield Served(time.perf_counter() - started_s, server.pid)
    finally:
        server.terminate()
        server.wait(30)


def call(path: str, *, method: str = "GET") -> dict[str, Any]:
    """The JSON answer of a control route."""
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", method=method)
    request.add_header("Accept", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


async def stream(
    prompt: list[int], num_tokens: int, *, api: str = "generate", end_s: float = math.inf
) -> tuple[list[float], dict[str, Any]]:
    """One request: when each of its events came, and the last of them.

    An event of `generate` repeats the answer so far, as SGLang's does; one of `completions` holds the new text alone.
    After `end_s` (of `time.perf_counter`) the client leaves.
    """
    body = APIS[api].body(prompt, num_tokens, Settings(MODEL_NAME))
    came_s: list[float] = []
    events = EventTimes(came_s.append)
    http = HttpClient(f"http://127.0.0.1:{PORT}")
    left_s = min(end_s - time.perf_counter(), ANSWER_LIMIT_S)
    try:
        await http.request("POST", APIS[api].path, body, on_body=events.take, timeout_s=left_s)
    except ConnectionBroke:
        if time.perf_counter() < end_s:
            raise
    finally:
        http.close()
    return came_s, json.loads(events.last)


def _answers() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health_generate", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
