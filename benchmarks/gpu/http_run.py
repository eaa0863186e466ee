#!/usr/bin/env python3
"""B3 through HTTP: `headwater serve` and 64 clients that stream, in processes of their own.

    http_run.py MODEL OUT.json

The clients speak plain HTTP/1.1 over sockets and count events, so that they cost the machine little.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from figures import Figures
from shapes import SHAPES, make_model

import workloads

PORT = 30077
NUM_PROCESSES = 4
START_LIMIT_S = 180.0


async def stream(prompt: list[int], num_tokens: int) -> tuple[float, float, int]:
    """One request: when its first and its last event came, and how many tokens."""
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": num_tokens}
    body = json.dumps({"input_ids": prompt, "sampling_params": params, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT, limit=1 << 24)
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    first_s = last_s = 0.0
    newest = b""
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            last_s = time.perf_counter()
            first_s = first_s or last_s
            newest = line
    writer.close()
    return first_s, last_s, json.loads(newest[6:])["meta_info"]["completion_tokens"]


def client(prompts: workloads.Prompts, num_tokens: int, begin, results) -> None:
    """A process with a share of the streams."""

    async def run() -> list[tuple[float, float, int]]:
        return await asyncio.gather(*(stream(prompt, num_tokens) for prompt in prompts))

    begin.wait()
    results.put(asyncio.run(run()))


def b3(num_tokens: int, seed: int) -> tuple[float, list[tuple[float, float, int]]]:
    """Seconds from the first request to the last event; perf_counter is one clock for all processes."""
    prompts = workloads.random_prompts(64, 1024, seed=seed)
    context = multiprocessing.get_context("fork")
    begin, results = context.Event(), context.Queue()
    shares = [prompts[index::NUM_PROCESSES] for index in range(NUM_PROCESSES)]
    processes = [context.Process(target=client, args=(share, num_tokens, begin, results)) for share in shares]
    for process in processes:
        process.start()
    time.sleep(0.3)
    started_s = time.perf_counter()
    begin.set()
    answers = [answer for _ in processes for answer in results.get()]
    for process in processes:
        process.join()
    assert all(answer[2] == num_tokens for answer in answers)
    return max(answer[1] for answer in answers) - started_s, answers


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    figures = Figures(options.out, {"model": options.model})
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.model, Path(root))
        command = [sys.executable, "-m", "headwater", "serve", "--model", str(folder), "--load-format", "dummy"]
        command += ["--device", options.device, "--context-length", "8192", "--port", str(PORT)]
        started_s = time.perf_counter()
        server = subprocess.Popen(command)
        try:
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health_generate", timeout=5) as answer:
                        if answer.status == 200:
                            break
                except OSError:
                    if server.poll() is not None or time.perf_counter() - started_s > START_LIMIT_S:
                        raise TimeoutError("the server did not start") from None
                    time.sleep(0.2)
            figures.put("start_to_first_answer_s", time.perf_counter() - started_s)
            b3(16, 100)
            for repeat in range(2):
                prefill_s, _ = b3(1, 101 + 2 * repeat)
                total_s, _ = b3(256, 102 + 2 * repeat)
                figures.put(f"http_B3_output_tokens_per_s_run{repeat}", 64 * 256 / total_s)
                figures.put(f"http_B3_prefill_tokens_per_s_run{repeat}", 64 * 1024 / prefill_s)
                figures.put(f"http_B3_step_ms_run{repeat}", (total_s - prefill_s) / 255 * 1e3)
        finally:
            server.terminate()
            server.wait(30)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))
