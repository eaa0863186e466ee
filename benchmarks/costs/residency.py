#!/usr/bin/env python3
"""What the sample of page residency costs the cache: processor time of one acquire, publish, release and eviction.

    residency.py [--prompts 200] [--pages 64] [--rounds 40]

The cache works with the sample, without it, and with every run in it, by turns in one process; each figure is the
shortest of all rounds. No model and no engine: the cache alone, whose cost is the whole of what the sample adds to.
"""

import argparse
import time

import numpy as np

from headwater.cache.lease import TokenSequence
from headwater.cache.namespace import Namespace, Tier
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.statistics.residency import SAMPLED_ONE_IN, Residency
from headwater.cache.tier_pages import count_use
from headwater.clock import MonotonicClock

PAGE_SIZE = 16
NAMESPACE = Namespace("", "", "", "weights")
MODES = {"without": None, f"one in {SAMPLED_ONE_IN}": SAMPLED_ONE_IN, "all": 1}


def made(num_pages: int, one_in: int | None) -> PrefixCache:
    clock = MonotonicClock()
    cache = PrefixCache(num_pages=num_pages, page_size=PAGE_SIZE, page_bytes=1, clock=clock)
    cache.tier_pages[Tier.DEVICE].residency = None if one_in is None else Residency(clock, one_in=one_in)
    return cache


def play(cache: PrefixCache, prompts: list[np.ndarray]) -> int:
    """Each prompt as a request: match, compute the rest, share it, end. Returns the pages that passed through."""
    num_pages = 0
    for prompt in prompts:
        lease = cache.acquire(NAMESPACE, TokenSequence(prompt), max_cached_tokens=len(prompt) - 1)
        count_use(lease.run.chain() if lease.run else ())
        wanted = len(prompt) // PAGE_SIZE - lease.num_shared_pages
        if cache.extend(lease, wanted) is not None:
            cache.publish(lease, len(prompt))
        cache.release(lease)
        num_pages += len(prompt) // PAGE_SIZE
    return num_pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--pages", type=int, default=64, help="of a prompt; its first quarter is shared")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    shared = random.integers(0, 1000, args.pages * PAGE_SIZE // 4, dtype=np.int32)
    prompts = [
        np.concatenate([shared, random.integers(0, 1000, args.pages * PAGE_SIZE - len(shared), dtype=np.int32)])
        for _ in range(args.prompts)
    ]
    capacity = args.prompts * args.pages // 2  # half of them are evicted in every round
    caches = {name: made(capacity, one_in) for name, one_in in MODES.items()}
    best = dict.fromkeys(MODES, float("inf"))
    for _ in range(args.rounds):
        for name, cache in caches.items():
            started_s = time.process_time()
            num_pages = play(cache, prompts)
            best[name] = min(best[name], (time.process_time() - started_s) / num_pages)
    for name, seconds in best.items():
        more = seconds - best["without"]
        per_request = more * args.pages * 1e6
        costs = f"{more * 1e9:+6.1f} ns a page  {per_request:+6.2f} us a request"
        print(f"{name:9}  {seconds * 1e9:7.1f} ns a page  {costs}")


if __name__ == "__main__":
    main()
