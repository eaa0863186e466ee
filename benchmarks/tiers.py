"""The benefit and cost of the cache's tiers.

It measures restored and computed prompts, copies and memcpy, the cost of tiers without hits, and the prefix tree's time
per token. Every figure is a ratio of alternating measurements in one run. The targets are printed beside the figures.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from headwater import Engine
from headwater.cache.lease import TokenSequence
from headwater.cache.namespace import Namespace
from headwater.cache.prefix_cache import PrefixCache
from headwater.clock import MonotonicClock
from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.host_memory import CpuPageCopier, HostMemory
from headwater.devices.kv_memory import KVLayout

sys.path.append(str(Path(__file__).resolve().parent / "serving"))
from headwater.bench.machine import busy_s
from results import save

POOL_TOKENS = 4096
PROMPT_TOKENS = 1600
NUM_CHATS = 6  # 2.3 times the device's capacity
LAYOUT = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, page_size=16, dtype="bfloat16")  # default model's
TIERS = {"enable_hierarchical_cache": True, "hicache_storage_prefetch_policy": "wait_complete"}
Record = dict[str, Any]


def prompt(number: int, num_tokens: int = PROMPT_TOKENS) -> list[int]:
    """Token ids with which no other prompt begins."""
    return np.random.default_rng(number).integers(1000, 40_000, num_tokens).tolist()


def ttft_s(engine: Engine, number: int) -> tuple[float, dict[str, int]]:
    """Seconds to the first token of a chat's next turn, and the tiers where its prompt was found."""
    started_s = time.perf_counter()
    answer = engine.generate(input_ids=prompt(number), sampling_params={"temperature": 0, "max_new_tokens": 1})
    return time.perf_counter() - started_s, answer["meta_info"]["cached_tokens_details"]


def chats(name: str, *, dtype: str, found_on: str | None, **args: Any) -> Record:
    """A second turn of each chat after all first turns, so that no chat is left on the device."""
    with Engine(dtype=dtype, max_total_tokens=POOL_TOKENS, **args) as engine:
        first = [ttft_s(engine, number)[0] for number in range(NUM_CHATS)]
        settle(engine)
        second = [ttft_s(engine, number) for number in range(NUM_CHATS)]
        counters = engine.get_state().counters
    hits = [details.get(found_on, 0) if found_on else 0 for _, details in second]
    times = [seconds for seconds, _ in second]
    record = {
        "case": f"chat {name}",
        "ttft_p50_s": statistics.median(times),
        "first_ttft_p50_s": statistics.median(first),
        "hit_tokens": hits,
        "found": [details for _, details in second],
        "dropped": {name: value for name, value in counters.items() if name.startswith("dropped")},
    }
    print(f"{record['case']:16} second turn {record['ttft_p50_s']:7.3f} s  first {record['first_ttft_p50_s']:7.3f} s  "
          f"{found_on or 'computed'}: {hits}", flush=True)  # fmt: skip
    assert found_on is None or min(hits) > PROMPT_TOKENS // 2, "what was to be measured did not happen"
    return record


def settle(engine: Engine) -> None:
    """Wait until no copy is in flight."""
    while engine.get_state().blockers:
        time.sleep(0.01)


def chat_ratios(dtype: str) -> list[Record]:
    records = [chats("recompute", dtype=dtype, found_on=None)]
    records.append(chats("host", dtype=dtype, found_on="host", hicache_ratio=4.0, **TIERS))
    with tempfile.TemporaryDirectory() as folder:
        store = {"hicache_storage_backend": "file", "hicache_storage_dir": folder}
        records.append(chats("file", dtype=dtype, found_on="storage", hicache_ratio=1.0, **TIERS, **store))
    base = records[0]["ttft_p50_s"]
    for record, target in zip(records[1:], (1 / 5, 1 / 3), strict=True):
        record["ratio_to_recompute"] = record["ttft_p50_s"] / base
        print(f"{record['case']:16} {record['ratio_to_recompute']:.3f} of recompute (target at most {target:.2f})")
    return records


def by_page(target: np.ndarray, source: np.ndarray, order: np.ndarray) -> None:
    """The least cost of moving scattered pages, without a thread: small copies write through the caches."""
    for index, page in enumerate(order.tolist()):
        np.copyto(target[page], source[index])


def copies(num_pages: int = 256, repeat: int = 15) -> list[Record]:
    """Offload and restore of scattered pages, alternating with a plain copy of the same size."""
    page_bytes = LAYOUT.page_bytes
    kv, host = CpuDevice().allocate_kv(LAYOUT, num_pages), HostMemory(num_pages=num_pages, page_bytes=page_bytes)
    host.pages.fill(1)  # allocates the memory
    kv.pages.fill(1)
    copier = CpuPageCopier(lambda: kv, host)
    source, target = np.ones((num_pages, page_bytes), np.uint8), np.zeros((num_pages, page_bytes), np.uint8)
    order = np.random.default_rng(0)
    pages = np.arange(num_pages, dtype=np.int32)
    shuffled = order.permutation(num_pages).astype(np.int32)

    def run(copy: Callable[[], Any]) -> None:
        handle = copy()
        while handle is not None and not handle.is_done():
            time.sleep(0.0002)

    cases: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: np.copyto(target, source),
        "memcpy by page": lambda: by_page(target, source, shuffled),
        "offload": lambda: copier.offload(shuffled, pages),
        "restore": lambda: copier.restore(pages, shuffled),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeat):
        for name, case in cases.items():
            started_s = time.perf_counter()
            run(case)
            times[name].append(time.perf_counter() - started_s)
    records = []
    for name, seconds in times.items():
        gb_s = num_pages * page_bytes / statistics.median(seconds) / 1e9
        whole, paged = (statistics.median(times[base]) / statistics.median(seconds) for base in cases if "mem" in base)
        records.append(
            {"case": f"copy {name}", "gb_s": gb_s, "ratio_to_memcpy": whole, "ratio_to_memcpy_by_page": paged}
        )
        print(
            f"copy {name:14} {gb_s:6.2f} GB/s  {whole:.2f} of memcpy (target at least 0.80), {paged:.2f} of it by page"
        )
    return records


def never_hit(dtype: str, num_rounds: int = 12) -> list[Record]:
    """Throughput of unique prompts, alternating between no tiers and write-through."""
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    with loaded(dtype) as off, loaded(dtype, **TIERS) as on:
        for number in range(num_rounds * 2):
            name = ("off", "on", "on", "off")[number % 4]
            engine = off if name == "off" else on
            batch = [prompt(10_000 + 8 * number + index, 256) for index in range(8)]
            started_s = time.perf_counter()
            engine.generate(
                input_ids=batch, sampling_params={"temperature": 0, "max_new_tokens": 32, "ignore_eos": True}
            )
            seconds[name].append(time.perf_counter() - started_s)
    loss = statistics.median(on / off for on, off in zip(seconds["on"], seconds["off"], strict=True)) - 1  # by round
    print(f"never hit        {loss:+.1%} time with tiers (target at most +2%)", flush=True)
    return [{"case": "never hit", "seconds": seconds, "loss": loss}]


@contextmanager
def loaded(dtype: str, **args: Any) -> Iterator[Engine]:
    with Engine(dtype=dtype, max_total_tokens=POOL_TOKENS, **args) as engine:
        engine.generate(input_ids=prompt(9_999, 64), sampling_params={"max_new_tokens": 4})
        yield engine


def tree(num_tokens: int = 100_000, repeat: int = 5) -> list[Record]:
    """Insertion (in chunks of 512) and match of one long prompt among many others."""
    page_size, clock = 16, MonotonicClock()
    cache = PrefixCache(
        num_pages=num_tokens // page_size * (repeat + 2), page_size=page_size, page_bytes=1, clock=clock
    )
    namespace = Namespace("", "", "", "w")
    inserts, matches = [], []
    for number in range(repeat):
        tokens = TokenSequence(np.asarray(prompt(number, num_tokens), dtype=np.int32))
        lease = cache.acquire(namespace, tokens, max_cached_tokens=num_tokens)
        assert cache.extend(lease, num_tokens // page_size) is not None
        started_s = time.perf_counter()
        for end in range(512, num_tokens + 512, 512):
            cache.publish(lease, min(end, num_tokens))
        inserts.append(time.perf_counter() - started_s)
        cache.release(lease)
        started_s = time.perf_counter()
        lease = cache.acquire(namespace, tokens, max_cached_tokens=num_tokens)
        matches.append(time.perf_counter() - started_s)
        assert lease.num_matched_pages == num_tokens // page_size
        cache.release(lease)
    per_token_us = (statistics.median(inserts) + statistics.median(matches)) / num_tokens * 1e6
    print(f"tree             {per_token_us:.3f} us per token at {num_tokens} tokens (target at most 1)", flush=True)
    return [
        {
            "case": "tree",
            "insert_s": statistics.median(inserts),
            "match_s": statistics.median(matches),
            "us_per_token": per_token_us,
        }
    ]


def measured(part: Callable[[], list[Record]]) -> list[Record]:
    """The part's records, with the cores used by others meanwhile; the part runs in this process."""
    started_s, busy, own_s = time.perf_counter(), busy_s(), time.process_time()
    records = part()
    wall_s = time.perf_counter() - started_s
    foreign_cores = max(0.0, ((busy_s() - busy) - (time.process_time() - own_s)) / wall_s)
    print(f"                 others used {foreign_cores:.2f} cores meanwhile", flush=True)
    return [record | {"foreign_cores": foreign_cores} for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only", nargs="*", choices=("chat", "copy", "never-hit", "tree"))
    parser.add_argument("--no-save", action="store_true", help="write no file")
    args = parser.parse_args()
    parts: dict[str, Callable[[], list[Record]]] = {
        "tree": tree,
        "copy": copies,
        "chat": lambda: chat_ratios(args.dtype),
        "never-hit": lambda: never_hit(args.dtype),
    }
    records = [
        record for name, part in parts.items() if not args.only or name in args.only for record in measured(part)
    ]
    if not args.no_save:
        print(save("tiers", records, servers={"headwater": {"dtype": args.dtype, "pool_tokens": POOL_TOKENS}}))


if __name__ == "__main__":
    main()
