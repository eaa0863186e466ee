"""Copies between KV memory and host memory: what arrives, how long it took, and what goes first."""

import threading
import time

import numpy as np
import pytest

from headwater.devices.cpu import host_memory
from headwater.devices.cpu.host_memory import CpuPageCopier, HostMemory, ThreadCopy
from headwater.devices.cpu.kv_memory import CpuKVMemory
from headwater.devices.kv_memory import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, page_size=2, dtype="bfloat16")
LIMIT_S = 60.0


def wait(*copies: ThreadCopy) -> None:
    give_up_s = time.monotonic() + LIMIT_S
    while not all(copy.is_done() for copy in copies):
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


def make(num_pages: int = 8) -> tuple[CpuKVMemory, HostMemory, CpuPageCopier]:
    kv = CpuKVMemory(LAYOUT, num_pages)
    kv.memory[:] = np.random.default_rng(0).integers(0, 256, kv.memory.shape, dtype=np.uint8)
    host = HostMemory(num_pages=num_pages, page_bytes=LAYOUT.page_bytes)
    return kv, host, CpuPageCopier(lambda: kv, host)


def test_a_round_trip_of_scattered_pages_keeps_every_bit() -> None:
    kv, host, copier = make()
    before = kv.memory.copy()
    device, away = np.array([5, 6, 7, 1, 3], np.int32), np.array([0, 1, 2, 7, 4], np.int32)
    wait(copier.offload(device, away))
    assert bytes(host.view(7)) == before[1].tobytes()
    back = np.array([4, 2, 0, 5, 7], np.int32)
    kv.memory[:] = 0
    wait(copier.restore(away, back))
    for source, target in zip(device, back, strict=True):
        assert np.array_equal(kv.memory[target], before[source])


class Clock:
    """In the place of `time`."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def perf_counter(self) -> float:
        self.pass_s(0.001)
        return self._now_s

    def pass_s(self, duration_s: float) -> None:
        self._now_s += duration_s


def test_what_a_copy_took_is_its_own_time_and_not_that_of_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bandwidths and the choice between restoring and computing rest on it. Each look at the clock is a millisecond."""
    clock = Clock()
    monkeypatch.setattr(host_memory, "time", clock)
    _, _, copier = make()
    pages, begun = np.arange(8, dtype=np.int32), threading.Event()
    slow = copier._start(lambda: begun.wait(LIMIT_S) and clock.pass_s(0.3), rank=0)
    quick = copier.offload(pages, pages)
    begun.set()
    wait(slow, quick)
    clock.pass_s(0.1)  # nobody looks for a while
    assert 0.3 <= slow.took_s < 0.31
    assert 0 < quick.took_s < 0.01


def test_a_restore_goes_before_offloads_that_wait() -> None:
    """A request waits for the one; write-through has time."""
    _, _, copier = make()
    pages, begun = np.arange(8, dtype=np.int32), threading.Event()
    order: list[str] = []
    busy = copier._start(lambda: begun.wait(LIMIT_S) and None, rank=0)
    late = copier._start(lambda: order.append("offload"), rank=1)
    soon = copier._start(lambda: order.append("restore"), rank=0)
    begun.set()
    wait(busy, late, soon, copier.restore(pages, pages))
    assert order == ["restore", "offload"]


def test_a_copy_that_raises_fails_alone() -> None:
    """A thread that ended with it would leave every later copy in flight for ever."""
    _, _, copier = make()
    pages = np.arange(8, dtype=np.int32)
    bad = copier.offload(pages, pages[:3])  # so many sources do not go into so few targets
    good = copier.offload(pages, pages)
    wait(bad, good)
    assert bad.has_failed
    assert not good.has_failed
