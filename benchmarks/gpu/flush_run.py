#!/usr/bin/env python3
"""`/flush_cache?mode=now` under 64 streams: the time of its answer, and gaps between tokens with and without flushes.

    flush_run.py MODEL OUT.json

Server, clients and the flushing client are separate processes. One-second windows without flushes alternate with
windows with a flush every half second, while the same streams go on; a gap belongs to its window. Gaps grow with the
texts, so a window with flushes is compared with the mean of its two neighbours. Another process only sleeps, one
millisecond at a time: its late wakings show which windows the machine itself disturbed. Every round has new streams;
the ratios are medians over the windows of all rounds.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import Figures
from served import call, serve, stream
from shapes import SHAPES, make_model

import workloads

NUM_PROCESSES = 4
NUM_TOKENS = 6000  # at most, of a stream: more than a round's time is enough for
SETTLE_S = 3.0  # until all prompts are computed and, on the host, pinned
WINDOW_S = 1.0
EVERY_S = 0.5
NUM_WINDOWS = 17  # of both kinds together, quiet ones first and last
Window = tuple[str, float, float]  # kind, beginning, end


def client(prompts: workloads.Prompts, api: str, end_s: float, results) -> None:
    """A process with a share of the streams, left at `end_s`: when the events of each came."""

    async def run() -> list[tuple[list[float], dict[str, Any]]]:
        return await asyncio.gather(*(stream(prompt, NUM_TOKENS, api=api, end_s=end_s) for prompt in prompts))

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


@dataclass(frozen=True, slots=True)
class Round:
    """What 64 streams met: times in seconds of `time.perf_counter`."""

    windows: list[Window]
    answered_s: list[float]  # to each flush
    streams: list[list[float]]  # when the events of each came
    late: list[tuple[float, float]]

    def gaps_ms(self, percent: float) -> list[float]:
        """That percentile of each window's gaps."""
        each = (gaps_s(self.streams, window) for window in self.windows)
        return [gaps[int(len(gaps) * percent / 100)] * 1e3 for gaps in each]

    def woken_late_ms(self) -> list[float]:
        """Of each window, how late the sleeper was in all."""
        return [
            sum(late_s for awake_s, late_s in self.late if began_s <= awake_s < ended_s) * 1e3
            for _, began_s, ended_s in self.windows
        ]


def measure(api: str, seed: int) -> Round:
    """A round with the server that runs."""
    prompts = workloads.random_prompts(64, 512, seed=seed)
    context = multiprocessing.get_context("fork")
    results, wakings = context.Queue(), context.Queue()
    end_s = time.perf_counter() + SETTLE_S + NUM_WINDOWS * WINDOW_S + 1.0
    shares = [prompts[index::NUM_PROCESSES] for index in range(NUM_PROCESSES)]
    processes = [context.Process(target=client, args=(share, api, end_s, results)) for share in shares]
    for process in processes:
        process.start()
    time.sleep(SETTLE_S)
    asleep = context.Process(target=sleeper, args=(NUM_WINDOWS * WINDOW_S + 1, wakings))
    asleep.start()
    answered_s: list[float] = []
    found = windows(answered_s)
    streams = [came_s for _ in processes for came_s in results.get(timeout=180)]
    late = wakings.get(timeout=60)
    for process in (*processes, asleep):
        process.join()
    assert min(came_s[-1] for came_s in streams) > found[-1][2], "the streams ended before the last window"
    return Round(found, answered_s, streams, late)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--api", choices=["completions", "generate"], default="completions", help="of the streams")
    options = parser.parse_args(argv)
    figures = Figures(options.out, {"model": options.model, "api": options.api, "tp_size": options.tp_size})
    tiers = ("--enable-hierarchical-cache", "--hicache-size", "8", "--tp-size", str(options.tp_size))
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.model, Path(root))
        with serve(folder, device=options.device, options=tiers):
            for number in range(options.rounds):
                rounds.append(measure(options.api, seed=90 + number))
                report(rounds, figures)
    return 0


def report(rounds: Sequence[Round], figures: Figures) -> None:
    """The figures of all rounds so far."""
    answered_s = [answer_s for each in rounds for answer_s in each.answered_s]
    figures.put("flush_now_answer_p50_ms", statistics.median(answered_s) * 1e3)
    figures.put("flush_now_answer_max_ms", max(answered_s) * 1e3)
    figures.put("woken_late_ms_by_window", [[round(late, 1) for late in each.woken_late_ms()] for each in rounds])
    for percent in (50, 99, 99.9):
        gaps = [each.gaps_ms(percent) for each in rounds]
        figures.put(f"gap_p{percent}_ms_by_window", [[round(gap, 2) for gap in each] for each in gaps])
        ratios = [2 * each[i] / (each[i - 1] + each[i + 1]) for each in gaps for i in range(1, NUM_WINDOWS, 2)]
        figures.put(f"gap_p{percent}_flushed_to_quiet", statistics.median(ratios))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))
