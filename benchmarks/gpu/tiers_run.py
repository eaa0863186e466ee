#!/usr/bin/env python3
"""The tiers on a GPU, or on several: the benefit of host hits, and the cost of tiers without hits.

    tiers_run.py MODEL OUT.json [--parts hits,cost] [--tp-size 2] [--chats 64]

hits: chats with prefixes of 4,096 tokens, of which the device's pool holds 16. A turn that finds its prefix on the
host is compared with one that computes it. Short prompts run while host memory is pinned, and after.

cost: prompts without hits, alternating with tiers and without.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import Figures
from shapes import SHAPES, kv_token_bytes, make_model

import workloads

GREEDY = {"temperature": 0, "ignore_eos": True}
PREFIX_TOKENS = 4096
POOL_TOKENS = 16 * PREFIX_TOKENS
SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "device": "cuda",
    "context_length": 8192,
    "max_running_requests": 64,
    "log_level": "warning",
}


def open_engine(folder: Path, *, model: str, host_chats: int, pool_tokens: int = POOL_TOKENS) -> Any:
    """`host_chats`: prefixes that the host tier holds; 0: no tiers."""
    from headwater import Engine

    tiers: dict[str, Any] = {}
    if host_chats:
        host_gb = 1.3 * host_chats * PREFIX_TOKENS * kv_token_bytes(model) / 1e9
        tiers = {"enable_hierarchical_cache": True, "hicache_size": host_gb}
    return Engine(str(folder), max_total_tokens=pool_tokens, **SETTINGS, **tiers)


def first_token_s(engine: Any, prompt: list[int]) -> tuple[float, dict[str, int]]:
    started_s = time.perf_counter()
    answer = engine.generate(input_ids=prompt, sampling_params=GREEDY | {"max_new_tokens": 1})
    return time.perf_counter() - started_s, answer["meta_info"]["cached_tokens_details"]


def wait_pinned(engine: Any) -> float:
    """Until copies reach all of the host memory; the seconds that took."""
    started_s = time.monotonic()
    while (host := engine.get_state().tiers["host"]).ready < host.capacity:
        assert time.monotonic() < started_s + 60, "host memory is not pinned"
        time.sleep(0.05)
    return time.monotonic() - started_s


def wait_idle(engine: Any) -> None:
    """Until no copy is in flight."""
    deadline_s = time.monotonic() + 60
    while engine.get_state().blockers:
        assert time.monotonic() < deadline_s, "copies do not end"
        time.sleep(0.01)


def hits(folder: Path, model: str, figures: Figures, num_chats: int) -> None:
    chats = workloads.random_prompts(num_chats, PREFIX_TOKENS, seed=70)
    ends = workloads.random_prompts(num_chats, 64, seed=71)
    with open_engine(folder, model=model, host_chats=num_chats) as engine:
        short = workloads.random_prompts(50, 64, seed=72)
        while_pinning = [first_token_s(engine, prompt)[0] for prompt in short]
        figures.put("pinned_after_s", wait_pinned(engine))
        pinned = [first_token_s(engine, prompt)[0] for prompt in workloads.random_prompts(50, 64, seed=73)]
        figures.put("ttft_64_tokens_while_pinning_p50_ms", statistics.median(while_pinning) * 1e3)
        figures.put("ttft_64_tokens_pinned_p50_ms", statistics.median(pinned) * 1e3)
        computed = [first_token_s(engine, chat + end[:32])[0] for chat, end in zip(chats, ends, strict=True)]
        wait_idle(engine)
        again = [first_token_s(engine, chat + end) for chat, end in zip(chats, ends, strict=True)]
        wait_idle(engine)
        at_once = [first_token_s(engine, chat + end) for chat, end in zip(chats[-8:], ends[-8:], strict=True)]
        counters = engine.get_state().counters
    restored = [seconds for seconds, details in again if details["host"] >= PREFIX_TOKENS - 16]
    figures.put("chats_from_host", len(restored))
    figures.put("ttft_computed_p50_ms", statistics.median(computed[4:]) * 1e3)
    if restored:
        figures.put("ttft_from_host_p50_ms", statistics.median(restored) * 1e3)
        figures.put("ttft_ratio", statistics.median(restored) / statistics.median(computed[4:]))
    on_device = [seconds for seconds, details in at_once if details["device"] >= PREFIX_TOKENS]
    if on_device:
        figures.put("ttft_from_device_p50_ms", statistics.median(on_device) * 1e3)
    figures.put("counters", {name: value for name, value in counters.items() if "store" in name or "offload" in name})


def cost(folder: Path, model: str, figures: Figures, num_chats: int) -> None:
    params = GREEDY | {"max_new_tokens": 128}
    # a pool in which nothing that has ended stays long
    with (
        open_engine(folder, model=model, host_chats=0) as without,
        open_engine(folder, model=model, host_chats=num_chats) as tiered,
    ):
        wait_pinned(tiered)
        ratios = []
        for repeat in range(6):
            prompts = workloads.random_prompts(96, 1024, seed=80 + repeat)
            order = [without, tiered] if repeat % 2 else [tiered, without]
            took = {}
            for engine in order:
                took[engine] = workloads.seconds(
                    lambda engine=engine, prompts=prompts: engine.generate(input_ids=prompts, sampling_params=params)
                )
                wait_idle(engine)
            if repeat:  # the first round warms up
                ratios.append(took[without] / took[tiered])
        figures.put("throughput_with_tiers_never_hit", statistics.median(ratios))
        figures.put("throughput_with_tiers_never_hit_all", [round(ratio, 4) for ratio in ratios])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", default="hits,cost")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--chats", type=int, default=64)
    options = parser.parse_args(argv)
    figures = Figures(options.out, {"model": options.model, "tp_size": options.tp_size})
    SETTINGS.update(device=options.device, tp_size=options.tp_size)
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.model, Path(root))
        for part in options.parts.split(","):
            {"hits": hits, "cost": cost}[part](folder, options.model, figures, options.chats)
            gc.collect()  # tens of gigabytes of host memory each
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
