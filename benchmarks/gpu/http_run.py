#!/usr/bin/env python3
"""B3 through HTTP: `headwater serve` and 64 clients that stream, in processes of their own.

    http_run.py MODEL OUT.json
"""

import argparse
import asyncio
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import Figures
from served import serve, stream
from shapes import SHAPES, make_model

import workloads

NUM_PROCESSES = 4


def client(prompts: workloads.Prompts, num_tokens: int, begin, results) -> None:
    """A process with a share of the streams: of each, when its last event came, and how many tokens."""

    async def run() -> list[tuple[list[float], dict[str, Any]]]:
        return await asyncio.gather(*(stream(prompt, num_tokens) for prompt in prompts))

    begin.wait()
    results.put([(came_s[-1], last["meta_info"]["completion_tokens"]) for came_s, last in asyncio.run(run())])


def b3(num_tokens: int, seed: int) -> float:
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
    assert all(count == num_tokens for _, count in answers)
    return max(last_s for last_s, _ in answers) - started_s


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    figures = Figures(options.out, {"model": options.model})
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.model, Path(root))
        with serve(folder, device=options.device) as server:
            figures.put("start_to_first_answer_s", server.start_s)
            b3(16, 100)
            for repeat in range(2):
                prefill_s = b3(1, 101 + 2 * repeat)
                cpu_s = server.api_cpu_s()
                total_s = b3(256, 102 + 2 * repeat)
                figures.put(f"http_B3_api_busy_run{repeat}", (server.api_cpu_s() - cpu_s) / total_s)
                figures.put(f"http_B3_output_tokens_per_s_run{repeat}", 64 * 256 / total_s)
                figures.put(f"http_B3_prefill_tokens_per_s_run{repeat}", 64 * 1024 / prefill_s)
                figures.put(f"http_B3_step_ms_run{repeat}", (total_s - prefill_s) / 255 * 1e3)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))
