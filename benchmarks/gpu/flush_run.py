#!/usr/bin/env python3
"""`/flush_cache?mode=now` under 64 streams: seconds to its answer, and the gaps between tokens beside those without.

    flush_run.py MODEL OUT.json

Server, clients and whoever flushes are processes of their own. One-second windows without flushes and with one every
half second follow each other while the same streams go on; a gap belongs to the window that it lies in. Gaps grow with
the texts, so a window with flushes is held against the mean of its two neighbours. One process more only sleeps, a
millisecond at a time: how late it is woken tells which windows the machine itself disturbed.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from figures import Figures
from served import call, serve, stream
from shapes import SHAPES, make_model

import workloads

NUM_PROCESSES = 4
WINDOW_S = 1.0
EVERY_S = 0.5
NUM_WINDOWS = 17  # of both kinds together, quiet ones first and last
Window = tuple[str, float, float]  # kind, beginning, end


def client(prompts: workloads.Prompts, num_tokens: int, results) -> None:
    """A process with a share of the streams: when the events of each came."""

    async def run() -> list[tuple[list[float], int]]:
        return await asyncio.gather(*(stream(prompt, num_tokens) for prompt in prompts))

    results.put([came_s for came_s, _ in asyncio.run(run())])


def sleeper(seconds: float, results) -> None:
    """A process that shows how late the machine wakes one: (when, how late) of wakings late by over a millisecond."""
    late: list[tuple[float, float]] = []
    end_s = time.perf_counter() + seconds
    while (asleep_s := time.perf_counter()) < end_s:
        time.sleep(1e-3)
        awake_s = time.perf_counter()
        if awake_s - asleep_s > 2e-3:
            late.append((awake_s, awake_s - asleep_s - 1e-3))
    results.put(late)


def windows(answered_s: list[float]) -> list[Window]:
    """Flush in every other window; `answered_s` takes the seconds to each answer."""
    found: list[Window] = []
    for index in range(NUM_WINDOWS):
        began_s = time.perf_counter()
        if index % 2:
            for number in range(int(WINDOW_S / EVERY_S)):
                time.sleep(max(0.0, began_s + number * EVERY_S - time.perf_counter()))
                asked_s = time.perf_counter()
                assert call("/flush_cache?mode=now", method="POST")["success"]
                answered_s.append(time.perf_counter() - asked_s)
        time.sleep(max(0.0, began_s + WINDOW_S - time.perf_counter()))
        found.append(("flushed" if index % 2 else "quiet", began_s, time.perf_counter()))
    return found


def gaps_s(streams: Sequence[Sequence[float]], window: Window) -> list[float]:
    _, began_s, ended_s = window
    pairs = (pair for came_s in streams for pair in itertools.pairwise(came_s))
    return sorted(later - earlier for earlier, later in pairs if earlier >= began_s and later < ended_s)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num-tokens", type=int, default=3000, help="of each stream: enough for all windows")
    options = parser.parse_args(argv)
    figures = Figures(options.out, {"model": options.model})
    tiers = ("--enable-hierarchical-cache", "--hicache-size", "8")
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.model, Path(root))
        with serve(folder, device=options.device, options=tiers):
            prompts = workloads.random_prompts(64, 512, seed=90)
            context = multiprocessing.get_context("fork")
            results, wakings = context.Queue(), context.Queue()
            shares = [prompts[index::NUM_PROCESSES] for index in range(NUM_PROCESSES)]
            processes = [context.Process(target=client, args=(s, options.num_tokens, results)) for s in shares]
            for process in processes:
                process.start()
            time.sleep(3.0)  # until all prompts are computed and, on the host, pinned
            asleep = context.Process(target=sleeper, args=(NUM_WINDOWS * WINDOW_S + 1, wakings))
            asleep.start()
            answered_s: list[float] = []
            found = windows(answered_s)
            streams = [came_s for _ in processes for came_s in results.get(timeout=180)]
            late = wakings.get(timeout=60)
            for process in (*processes, asleep):
                process.join()
    assert min(came_s[-1] for came_s in streams) > found[-1][2], "the streams ended before the last window"
    figures.put("flush_now_answer_p50_ms", statistics.median(answered_s) * 1e3)
    figures.put("flush_now_answer_max_ms", max(answered_s) * 1e3)
    figures.put("woken_late_ms_by_window", [
        round(sum(late_s for awake_s, late_s in late if began_s <= awake_s < ended_s) * 1e3, 1)
        for _, began_s, ended_s in found
    ])  # fmt: skip
    for percent in (50, 99, 99.9):
        each = [gaps[int(len(gaps) * percent / 100)] * 1e3 for gaps in (gaps_s(streams, window) for window in found)]
        figures.put(f"gap_p{percent}_ms_by_window", [round(gap, 2) for gap in each])
        ratios = [2 * each[i] / (each[i - 1] + each[i + 1]) for i in range(1, NUM_WINDOWS, 2)]
        figures.put(f"gap_p{percent}_flushed_to_quiet", statistics.median(ratios))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))
