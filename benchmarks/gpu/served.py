"""A server in a process of its own, and clients that stream from it by plain HTTP/1.1, which costs them little."""

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PORT = 30077
START_LIMIT_S = 180.0


@contextmanager
def serve(folder: Path, *, device: str, options: Sequence[str] = ()) -> Iterator[float]:
    """`headwater serve` with random weights; gives the seconds from its start to its first answer."""
    command = [sys.executable, "-m", "headwater", "serve", "--model", str(folder), "--load-format", "dummy"]
    command += ["--device", device, "--context-length", "8192", "--port", str(PORT), *options]
    started_s = time.perf_counter()
    server = subprocess.Popen(command)
    try:
        while not _answers():
            if server.poll() is not None or time.perf_counter() - started_s > START_LIMIT_S:
                raise TimeoutError("the server did not start")
            time.sleep(0.2)
        yield time.perf_counter() - started_s
    finally:
        server.terminate()
        server.wait(30)


def call(path: str, *, method: str = "GET") -> dict[str, Any]:
    """The JSON answer of a control route."""
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", method=method)
    request.add_header("Accept", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


async def stream(prompt: list[int], num_tokens: int) -> tuple[list[float], int]:
    """One request: when each of its events came, and how many tokens it has in the end."""
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": num_tokens}
    body = json.dumps({"input_ids": prompt, "sampling_params": params, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=1 << 24)
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    came_s: list[float] = []
    newest = b""
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            came_s.append(time.perf_counter())
            newest = line
    writer.close()
    return came_s, json.loads(newest[6:])["meta_info"]["completion_tokens"]


def _answers() -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health_generate", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
