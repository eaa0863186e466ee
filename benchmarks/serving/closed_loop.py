#!/usr/bin/env python3
"""A closed loop through HTTP: each of 64 clients streams one answer after another. First tokens, and gaps between them.

    closed_loop.py MODEL OUT.json [--clients 64] [--requests 5] [-- --max-gap-ms 25]

Prompts have 256 to 1,024 tokens and answers 64 to 320, all distinct. Gaps and first tokens count from each client's
second request until the first client has ended, so while all are busy. What is behind `--` goes to `headwater serve`.
"""

import argparse
import asyncio
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

from figures import Figures
from served import serve, stream
from shapes import SHAPES, make_model

NUM_PROCESSES = 8


class Answer(NamedTuple):
    """`came_s` are the times of its events, on the clock that all processes share."""

    client: int
    turn: int
    sent_s: float
    came_s: list[float]
    num_tokens: int


async def client(number: int, num_requests: int) -> list[Answer]:
    draw, answers = random.Random(number), []
    for turn in range(num_requests):
        prompt = [draw.randrange(10, 10_000) for _ in range(draw.randint(256, 1024))]
        num_tokens, sent_s = draw.randint(64, 320), time.perf_counter()
        came_s, _ = await stream(prompt, num_tokens, api="completions")
        answers.append(Answer(number, turn, sent_s, came_s, num_tokens))
    return answers


def process(numbers: Sequence[int], num_requests: int, begin: Any, results: Any) -> None:
    async def run() -> list[list[Answer]]:
        return await asyncio.gather(*(client(number, num_requests) for number in numbers))

    begin.wait()
    results.put([answer for answers in asyncio.run(run()) for answer in answers])


def load(num_clients: int, num_requests: int) -> list[Answer]:
    context = multiprocessing.get_context("fork")
    begin, results = context.Event(), context.Queue()
    shares = [share for index in range(NUM_PROCESSES) if (share := range(index, num_clients, NUM_PROCESSES))]
    processes = [context.Process(target=process, args=(share, num_requests, begin, results)) for share in shares]
    for each in processes:
        each.start()
    time.sleep(0.3)
    begin.set()
    answers = [answer for _ in processes for answer in results.get()]
    for each in processes:
        each.join()
    return answers


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(answers: list[Answer], put: Any) -> None:
    last = max(answer.turn for answer in answers)
    begins_s = max(answer.came_s[-1] for answer in answers if answer.turn == 0)
    ends_s = min(answer.came_s[-1] for answer in answers if answer.turn == last)
    first_tokens = [
        answer.came_s[0] - answer.sent_s
        for answer in answers
        if begins_s <= answer.sent_s and answer.came_s[0] <= ends_s
    ]
    gaps = [
        after - before
        for answer in answers
        for before, after in zip(answer.came_s, answer.came_s[1:], strict=False)
        if begins_s <= before and after <= ends_s
    ]
    whole_s = max(answer.came_s[-1] for answer in answers) - min(answer.sent_s for answer in answers)
    put("output_tokens_per_s", sum(answer.num_tokens for answer in answers) / whole_s)
    put("num_first_tokens", len(first_tokens))
    put("first_token_ms_p50", 1e3 * statistics.median(first_tokens))
    put("first_token_ms_p99", 1e3 * percentile(first_tokens, 0.99))
    put("gap_ms_p50", 1e3 * statistics.median(gaps))
    put("gap_ms_p90", 1e3 * percentile(gaps, 0.9))
    put("gap_ms_p99", 1e3 * percentile(gaps, 0.99))
    put("gap_ms_max", 1e3 * max(gaps))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=5, help="of each client, at least 2")
    end = argv.index("--") if "--" in argv else len(argv)
    options, flags = parser.parse_args(argv[:end]), argv[end + 1 :]
    if options.requests < 2 or options.clients < 1:
        parser.error("--requests must be at least 2 and --clients at least 1")
    figures = Figures(options.out, {"model": options.model, "clients": options.clients, "flags": flags})
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.model, Path(root))
        with serve(folder, device=options.device, options=flags) as server:
            figures.put("start_to_first_answer_s", server.start_s)
            load(options.clients, 2)  # warms up
            report(load(options.clients, options.requests), figures.put)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
