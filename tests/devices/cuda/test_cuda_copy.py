"""Copies between a GPU and registered host memory; the kernel itself in its interpreter, the driver's part replaced."""

import threading
import time

import numpy as np
import pytest
import torch

from headwater.devices.cpu.host_memory import ThreadCopy
from headwater.devices.cuda import host_memory as cuda_host_memory
from headwater.devices.cuda.arrivals import Arrivals
from headwater.devices.cuda.host_memory import PinnedHostMemory, register_with_driver
from headwater.devices.cuda.kv_memory import CudaKVMemory
from headwater.devices.cuda.page_copies import (
    CudaPageCopier,
    PageMover,
    choose_mover,
    move_by_copy_engine,
    move_by_kernel,
)
from headwater.devices.kv_memory import KVLayout

pytestmark = [pytest.mark.slow, pytest.mark.gpu]  # torch, and Triton's interpreter
LAYOUT = KVLayout(num_layers=3, num_kv_heads=1, head_dim=20, page_size=2, dtype="bfloat16")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the CPU: Triton's interpreter
LIMIT_S = 60.0
_PIECE_BYTES = 1 << 20
MOVERS = [move_by_kernel, *([move_by_copy_engine] if DEVICE.type == "cuda" else [])]


def make_kv() -> CudaKVMemory:
    return CudaKVMemory(LAYOUT, torch.randn(8, *LAYOUT.page_shape).to(DEVICE, torch.bfloat16))


def wait(*copies: ThreadCopy) -> None:
    give_up_s = time.monotonic() + LIMIT_S
    while not all(copy.is_done() for copy in copies):
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests touch little memory."""
    monkeypatch.setattr(cuda_host_memory, "_PIECE_BYTES", _PIECE_BYTES)


def until(condition) -> None:
    give_up_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


@pytest.mark.parametrize("mover", MOVERS)
def test_scattered_pages_arrive_there_and_back(mover: PageMover) -> None:
    kv = make_kv()
    register = register_with_driver if DEVICE.type == "cuda" else lambda address, size: None
    host = PinnedHostMemory(num_pages=8, page_bytes=LAYOUT.page_bytes, register=register)
    others = set(threading.enumerate())
    copier = CudaPageCopier(lambda: kv, host, device=DEVICE, arrivals=Arrivals(), mover=mover)
    before = kv.pages.clone()
    device, away = np.array([5, 6, 7, 1, 3], np.int32), np.array([0, 1, 2, 7, 4], np.int32)
    copy = copier.offload(device, away)
    wait(copy)
    assert not copy.has_failed and copy.took_s > 0
    for source, target in zip(device, away, strict=True):
        assert bytes(host.view(target)) == before[source].cpu().view(-1).view(torch.uint8).numpy().tobytes()
    assert not np.asarray(host.view(3)).any(), "a page that was not asked for is untouched"
    kv.pages.zero_()
    back = np.array([4, 2, 0, 5, 7], np.int32)
    wait(copier.restore(away, back))
    for source, target in zip(device, back, strict=True):
        assert torch.equal(kv.pages[target].view(torch.int16), before[source].view(torch.int16))
    copier.close()
    if DEVICE.type == "cuda":
        host.close()
    assert not [thread for thread in set(threading.enumerate()) - others if thread.name.endswith("-pages")]


def test_nobody_waits_for_memory_but_a_copy_does() -> None:
    """Pinning 100 GB takes half a minute: the server must be up long before, and no copy reach unpinned pages."""
    may_register = threading.Semaphore(0)
    registered: list[tuple[int, int]] = []

    def register(address: int, num_bytes: int) -> None:
        may_register.acquire()
        registered.append((address, num_bytes))

    page_bytes = _PIECE_BYTES // 4
    host = PinnedHostMemory(num_pages=10, page_bytes=page_bytes, register=register)
    assert host.num_ready_bytes == 0
    has_waited = threading.Event()
    waiter = threading.Thread(target=lambda: (host.wait_ready(np.array([5, 2], np.int32)), has_waited.set()))
    waiter.start()
    may_register.release()
    until(lambda: host.num_ready_bytes >= _PIECE_BYTES or len(registered) >= 1)
    assert host.num_ready_pages in (0, 4), "whole pieces, or nothing yet"
    assert not has_waited.is_set(), "page 5 lies in the second piece"
    may_register.release(5)
    waiter.join(LIMIT_S)
    assert has_waited.is_set()
    until(lambda: host.num_ready_bytes == 10 * page_bytes)
    assert host.num_ready_pages == 10
    start = host.pages.ctypes.data
    assert sorted(registered) == [
        (start + at, min(_PIECE_BYTES, 10 * page_bytes - at)) for at in range(0, 10 * page_bytes, _PIECE_BYTES)
    ]


def test_closing_gives_back_what_was_pinned_even_in_the_middle_of_pinning() -> None:
    """Memory that stays pinned is lost to the machine: the third engine of a process would not fit."""
    registered: list[int] = []
    unregistered: list[int] = []
    second = threading.Event()

    def register(address: int, num_bytes: int) -> None:
        if registered:
            second.wait(LIMIT_S)
        registered.append(address)

    host = PinnedHostMemory(
        num_pages=40, page_bytes=_PIECE_BYTES // 2, register=register, unregister=unregistered.append
    )
    until(lambda: host.num_ready_bytes >= _PIECE_BYTES)
    closing = threading.Thread(target=host.close)
    closing.start()
    until(lambda: host._is_closing)
    second.set()
    closing.join(LIMIT_S)
    assert not closing.is_alive()
    assert sorted(unregistered) == sorted(registered)
    assert len(registered) < 20


def test_memory_that_cannot_be_pinned_fails_its_copies_and_no_others() -> None:
    """They cost hits; a server that ended or waited for ever would cost everything."""
    kv = make_kv()

    def register(address: int, num_bytes: int) -> None:
        raise OSError("no more locked memory")

    host = PinnedHostMemory(num_pages=8, page_bytes=LAYOUT.page_bytes, register=register)
    copier = CudaPageCopier(lambda: kv, host, device=DEVICE, arrivals=Arrivals())
    pages = np.arange(4, dtype=np.int32)
    for _ in range(2):
        copy = copier.offload(pages, pages)
        wait(copy)
        assert copy.has_failed


def test_small_pages_go_by_kernel() -> None:
    """A copy engine needs microseconds a piece, whatever its size."""
    assert choose_mover(16 << 10) is move_by_kernel
