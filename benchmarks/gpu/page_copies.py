#!/usr/bin/env python3
"""Scattered pages between the device and host memory, by copy engine and by kernel, beside one large pinned copy.

    page_copies.py OUT.json

The copier is the server's own, threads and all; `share` is of the large copy measured beside it, for one copy of
512 MiB from the call to its end, and for four in flight at once. `beside_step` is how much longer matrix products take
while pages move.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from figures import Figures

from headwater.cache.copier import CopyHandle
from headwater.devices.cuda.arrivals import Arrivals
from headwater.devices.cuda.host_memory import PinnedHostMemory
from headwater.devices.cuda.kv_memory import CudaKVMemory
from headwater.devices.cuda.page_copies import CudaPageCopier, PageMover, move_by_copy_engine, move_by_kernel
from headwater.devices.kv_memory import KVLayout

DEVICE = torch.device("cuda", 0)
GIB = 1 << 30
MOVED_BYTES = 512 << 20
METHODS: dict[str, PageMover] = {"kernel": move_by_kernel, "copy_engine": move_by_copy_engine}


def wait_s(start: Callable[[], CopyHandle], *, num_copies: int = 1) -> float:
    """From the call to the end of so many copies, as the loop sees it; of one of them."""
    started_s = time.perf_counter()
    copies = [start() for _ in range(num_copies)]
    while not all(copy.is_done() for copy in copies):
        assert time.perf_counter() - started_s < 20, "a copy does not end"
        time.sleep(0.00005)
    assert not any(copy.has_failed for copy in copies)
    return (time.perf_counter() - started_s) / num_copies


def large_copies() -> tuple[float, float]:
    """GB/s to the device and to the host of one pinned copy."""
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(GIB, dtype=torch.uint8, device=DEVICE)

    def once(target: torch.Tensor, source: torch.Tensor) -> float:
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return GIB / (time.perf_counter() - started_s) / 1e9

    rates = [(once(device, host), once(host, device)) for _ in range(6)][1:]
    return statistics.median(r[0] for r in rates), statistics.median(r[1] for r in rates)


def measure(kib: int, method: str, figures: Figures) -> None:
    to_device, to_host = large_copies()
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=64, page_size=kib * 4, dtype="bfloat16")
    assert layout.page_bytes == kib * 1024
    num_pages, num_moved = 2 * GIB // layout.page_bytes, MOVED_BYTES // layout.page_bytes
    kv = CudaKVMemory(layout, torch.zeros((num_pages, *layout.page_shape), dtype=torch.bfloat16, device=DEVICE))
    host = PinnedHostMemory(num_pages=num_pages, page_bytes=layout.page_bytes)
    host.wait_ready(np.array([num_pages - 1], np.int32))
    copier = CudaPageCopier(lambda: kv, host, device=DEVICE, arrivals=Arrivals(), mover=METHODS[method])
    source = np.random.default_rng(kib)
    on_device, on_host = (source.permutation(num_pages)[:num_moved].astype(np.int32) for _ in range(2))
    for num_copies, label in ((1, ""), (4, "_4_in_flight")):
        restores, offloads = [], []
        for _ in range(5):
            offloads.append(wait_s(lambda: copier.offload(on_device, on_host), num_copies=num_copies))
            restores.append(wait_s(lambda: copier.restore(on_host, on_device), num_copies=num_copies))
        for kind, times, link in (("restore", restores[1:], to_device), ("offload", offloads[1:], to_host)):
            rate = MOVED_BYTES / statistics.median(times) / 1e9
            figures.put(f"{kib}_kib_{method}_{kind}{label}_gb_per_s", rate)
            figures.put(f"{kib}_kib_{method}_{kind}{label}_share", rate / link)
    figures.put(f"{kib}_kib_{method}_beside_step", beside_step(lambda: copier.restore(on_host, on_device)))
    copier.close()
    host.close()


def beside_step(start: Callable[[], CopyHandle]) -> float:
    """Time of memory-bound products while pages move, as a multiple of their time alone."""
    weight = torch.randn(28672, 4096, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(64, 4096, device=DEVICE, dtype=torch.bfloat16)

    def products() -> float:
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        for _ in range(60):
            torch.nn.functional.linear(x, weight)
        ended.record()
        ended.synchronize()
        return started.elapsed_time(ended)

    products()
    alone = statistics.median(products() for _ in range(3))
    copies = [start() for _ in range(4)]
    time.sleep(0.001)
    beside = products()
    while not all(copy.is_done() for copy in copies):
        time.sleep(0.001)
    return beside / alone


def main() -> int:
    figures = Figures(Path(sys.argv[1]), {"device": torch.cuda.get_device_name()})
    for kib in (16, 64, 256, 2048):
        for method in METHODS:
            try:
                measure(kib, method, figures)
            except (ImportError, AttributeError, RuntimeError, TypeError) as error:  # one way may not exist here
                figures.put(f"{kib}_kib_{method}_error", f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
