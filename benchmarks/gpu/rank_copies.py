#!/usr/bin/env python3
"""Pages between host memory of whole pages and the GPUs of ranks, each of which copies its heads, all at the same time.

    rank_copies.py OUT.json [--ranks 2]

The shape is that of an 8B model: with two ranks a piece of 16 KiB is the keys or values of a page in a layer. `share`
is of one large pinned copy of the same card, timed while the other cards do the same.
"""

import argparse
import mmap
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figures

from headwater.devices.cpu.ranks.page_share import PageShare
from headwater.devices.cuda.arrivals import Arrivals
from headwater.devices.cuda.host_memory import PinnedHostMemory
from headwater.devices.cuda.kv_memory import CudaKVMemory
from headwater.devices.cuda.page_copies import CudaPageCopier
from headwater.devices.kv_memory import KVLayout
from headwater.launch.cuda_placement import register_on

NUM_HEADS = 8
LAYOUT = partial(KVLayout, num_layers=32, head_dim=128, page_size=16, dtype="bfloat16")
WHOLE = LAYOUT(num_kv_heads=NUM_HEADS)
NUM_PAGES = 2048
MOVED_BYTES = 512 << 20  # of a rank
NUM_ROUNDS = 6
GIB = 1 << 30


class Card:
    """A rank's GPU, its copier, and what is timed."""

    def __init__(self, share: PageShare, device: torch.device, buffer: mmap.mmap) -> None:
        began_s = time.perf_counter()
        self.host = PinnedHostMemory(
            num_pages=NUM_PAGES, page_bytes=WHOLE.page_bytes, buffer=buffer, register=partial(register_on, device)
        )
        self.host.wait_ready(np.array([NUM_PAGES - 1], np.int32))
        self.pinned_gb_per_s = NUM_PAGES * WHOLE.page_bytes / (time.perf_counter() - began_s) / 1e9
        own = share.own
        kv = CudaKVMemory(own, torch.zeros((NUM_PAGES, own.page_bytes), dtype=torch.uint8, device=device))
        self.copier = CudaPageCopier(lambda: kv, self.host, device=device, arrivals=Arrivals(), share=share)
        source = np.random.default_rng(1)  # equal on all ranks: they copy their heads of the same pages
        num_moved = MOVED_BYTES // own.page_bytes
        self._on_card, self._on_host = (
            source.permutation(NUM_PAGES)[:num_moved].astype(np.int32) for _ in range(2)
        )
        self._large_host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
        self._large = torch.empty(GIB, dtype=torch.uint8, device=device)
        self.kinds: dict[str, tuple[Callable[[], None], int]] = {
            "link_to_card": (lambda: self._copy_large(self._large, self._large_host), GIB),
            "restore": (lambda: _finish(self._restore), MOVED_BYTES),
            "restore_4_in_flight": (lambda: _finish(*[self._restore] * 4), 4 * MOVED_BYTES),
            "link_to_host": (lambda: self._copy_large(self._large_host, self._large), GIB),
            "offload": (lambda: _finish(self._offload), MOVED_BYTES),
            "offload_4_in_flight": (lambda: _finish(*[self._offload] * 4), 4 * MOVED_BYTES),
        }

    def _restore(self) -> Any:
        return self.copier.restore(self._on_host, self._on_card)

    def _offload(self) -> Any:
        return self.copier.offload(self._on_card, self._on_host)

    def _copy_large(self, target: torch.Tensor, origin: torch.Tensor) -> None:
        target.copy_(origin, non_blocking=True)
        torch.cuda.synchronize(self._large.device)


def _finish(*starts: Callable[[], Any]) -> None:
    copies = [start() for start in starts]
    while not all(copy.is_done() for copy in copies):
        time.sleep(0.00005)
    assert not any(copy.has_failed for copy in copies)


def rank_process(rank: int, num_ranks: int, shared_file: str, barrier: Any, results: Any) -> None:
    """Puts the figures of one card into `results`, by name, in GB/s."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    own = LAYOUT(num_kv_heads=NUM_HEADS // num_ranks)
    heads = range(rank * own.num_kv_heads, (rank + 1) * own.num_kv_heads)
    share = PageShare.of(WHOLE, own, heads=heads, rank=rank, num_ranks=num_ranks)
    with open(shared_file, "r+b") as file:
        buffer = mmap.mmap(file.fileno(), NUM_PAGES * WHOLE.page_bytes)
    card = Card(share, device, buffer)
    found = {"pinned_gb_per_s": card.pinned_gb_per_s}
    for name, (work, num_bytes) in card.kinds.items():
        times = []
        for _ in range(NUM_ROUNDS):
            barrier.wait(120)
            began_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - began_s)
        found[f"{name}_gb_per_s"] = num_bytes / statistics.median(times[1:]) / 1e9
    barrier.wait(120)
    results.put((rank, found))
    card.copier.close()
    card.host.close()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args(argv)
    figures = Figures(options.out, {"num_ranks": options.ranks})
    memory = os.memfd_create("pages")
    os.ftruncate(memory, NUM_PAGES * WHOLE.page_bytes)
    shared_file = f"/proc/{os.getpid()}/fd/{memory}"
    context = multiprocessing.get_context("spawn")
    for num in sorted({1, options.ranks}):  # one: a card alone, which copies whole pages by the same kernel
        barrier, results = context.Barrier(num), context.Queue()
        ranks = [
            context.Process(target=rank_process, args=(rank, num, shared_file, barrier, results), daemon=True)
            for rank in range(num)
        ]
        for process in ranks:
            process.start()
        for rank, found in sorted(results.get(timeout=180) for _ in ranks):
            for name, value in found.items():
                figures.put(f"of_{num}_rank_{rank}_{name}", value)
            for kind, link in (("restore", "link_to_card"), ("offload", "link_to_host")):
                for name in (kind, f"{kind}_4_in_flight"):
                    ratio = found[f"{name}_gb_per_s"] / found[f"{link}_gb_per_s"]
                    figures.put(f"of_{num}_rank_{rank}_{name}_share", ratio)
        for process in ranks:
            process.join(30)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
