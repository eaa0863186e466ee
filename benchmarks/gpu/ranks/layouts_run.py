#!/usr/bin/env python3
"""Engines times ranks behind one port: requests that share a prefix, quiet and under flushes of every mode.

    layouts_run.py MODEL OUT.json --dp-size 2 --tp-size 2 [--requests 256] [--shared 2048] [--device cpu]

Each flush goes to all engines. The run fails if an engine did not make one, if a page is lost at the end, or if an
engine still knows the prefix after a last flush. `texts` are those of engine 0; run.py compares them between layouts.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures import Figures
from served import PORT, call, serve
from shapes import SHAPES, make_model

import workloads

NUM_STREAMS = 64
NUM_TOKENS = 64
EVERY_S = 0.4
MODES = ("mode=now", "mode=drain", "mode=idle&hold=true")
NUM_TEXTS = 6


def ask(prompt: list[int], num_tokens: int = NUM_TOKENS, **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": num_tokens}
    body = json.dumps({"input_ids": prompt, "sampling_params": sampling, **more}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/generate", data=body, method="POST")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())


def flush(parameters: str, num_engines: int) -> float:
    """Seconds to the answer of a flush, which all engines must have made."""
    asked_s = time.perf_counter()
    answer = call(f"/flush_cache?{parameters}&timeout=50", method="POST")
    made = [engine["success"] for engine in answer["engines"]]
    assert made == [True] * num_engines, answer
    return time.perf_counter() - asked_s


def ask_all(prompts: workloads.Prompts, name: str, figures: Figures) -> None:
    """The throughput of all prompts, so many at a time."""
    began_s = time.perf_counter()
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        answers = list(pool.map(ask, prompts))
    took_s = time.perf_counter() - began_s
    cached = sum(answer["meta_info"]["cached_tokens"] for answer in answers)
    figures.put(f"{name}_output_tokens_per_s", NUM_TOKENS * len(prompts) / took_s)
    figures.put(f"{name}_cached_share", cached / sum(map(len, prompts)))


def ask_under_flushes(prompts: workloads.Prompts, num_engines: int, figures: Figures) -> None:
    """The same while flushes of every mode follow each other."""
    stop = threading.Event()
    answered_ms: dict[str, list[float]] = {mode: [] for mode in MODES}

    def go_on() -> None:
        while not stop.is_set():
            for mode in MODES:
                answered_ms[mode].append(flush(mode, num_engines) * 1e3)
                stop.wait(EVERY_S)

    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(go_on)
        try:
            ask_all(prompts, "flushed", figures)
        finally:
            stop.set()
        flushing.result()
    for mode, values in answered_ms.items():
        name = mode.partition("&")[0].partition("=")[2]
        figures.put(f"flush_{name}_num", len(values))
        figures.put(f"flush_{name}_p50_ms", statistics.median(values))
        figures.put(f"flush_{name}_max_ms", max(values))


def check_pages(prompt: list[int], num_engines: int, figures: Figures) -> None:
    """No page is lost, and after a flush of all engines none knows the prefix."""
    while not call("/control/blockers")["is_idle"]:
        time.sleep(0.1)
    tiers = call("/cache")["tiers"]
    lost = {name: it["capacity_pages"] - it["free_pages"] - it["evictable_pages"] for name, it in tiers.items()}
    figures.put("lost_pages", lost)
    flush("mode=now", num_engines)
    after = [ask(prompt, 1, routed_dp_rank=engine)["meta_info"]["cached_tokens"] for engine in range(num_engines)]
    figures.put("cached_tokens_after_a_flush", after)
    assert not any(lost.values()), "pages are lost"
    assert not any(after), "an engine knows what was flushed"


def texts(prompts: workloads.Prompts, num_engines: int, figures: Figures) -> None:
    found = [
        [ask(prompt, 24, routed_dp_rank=engine)["output_ids"] for prompt in prompts[:NUM_TEXTS]]
        for engine in range(num_engines)
    ]
    figures.put("engines_with_equal_texts", sum(each == found[0] for each in found))
    figures.put("texts", found[0])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--dp-size", type=int, default=1)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--shared", type=int, default=2048, help="tokens of the prefix")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    num_engines = options.dp_size
    figures = Figures(options.out, {"model": options.model, "dp_size": num_engines, "tp_size": options.tp_size})
    sizes = ("--dp-size", str(num_engines), "--tp-size", str(options.tp_size))
    tiers = ("--enable-hierarchical-cache", "--hicache-size", "4", "--log-level", "warning")
    prompts = workloads.prompts_with_shared_prefix(options.requests, shared=options.shared, own=64, seed=70)
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.model, Path(root))
        with serve(folder, device=options.device, options=(*sizes, *tiers)) as server:
            figures.put("start_s", server.start_s)
            texts(prompts, num_engines, figures)
            ask_all(prompts, "first", figures)
            ask_all(prompts, "quiet", figures)
            ask_under_flushes(prompts, num_engines, figures)
            check_pages(prompts[0], num_engines, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
