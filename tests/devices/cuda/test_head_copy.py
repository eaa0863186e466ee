"""Ranks on GPUs copy their heads: host memory is that of a single process. Compared with numpy's copies."""

import mmap
import time

import numpy as np
import pytest
import torch

from headwater.devices.cpu.host_memory import ThreadCopy
from headwater.devices.cpu.ranks.page_share import PageShare
from headwater.devices.cuda.arrivals import Arrivals
from headwater.devices.cuda.host_memory import PinnedHostMemory, register_with_driver
from headwater.devices.cuda.kv_memory import CudaKVMemory
from headwater.devices.cuda.page_copies import CudaPageCopier
from headwater.devices.kv_memory import KVLayout

pytestmark = [pytest.mark.slow, pytest.mark.gpu]  # torch, and Triton's interpreter
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the CPU: Triton's interpreter
NUM_PAGES = 4
DEVICE_PAGES = np.array([3, 1, 2], dtype=np.int32)
HOST_PAGES = np.array([0, 4, 5], dtype=np.int32)


def layout(num_kv_heads: int, dtype: str, *, page_size: int) -> KVLayout:
    return KVLayout(num_layers=2, num_kv_heads=num_kv_heads, head_dim=8, page_size=page_size, dtype=dtype)


def wait(copy: ThreadCopy) -> None:
    deadline_s = time.monotonic() + 20
    while not copy.is_done():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    assert not copy.has_failed


# heads of several ranks; exponents, whose heads are of 3 bytes; two holders of one head
@pytest.mark.parametrize(
    ("dtype", "num_heads", "num_ranks", "page_size"),
    [("float32", 4, 2, 3), ("bfloat16", 6, 3, 3), ("float8_e5m2", 4, 2, 3), ("bfloat16", 1, 2, 4)],
)
def test_ranks_write_and_read_the_pages_of_one_process(
    dtype: str, num_heads: int, num_ranks: int, page_size: int
) -> None:
    """Heads in another place, exponents left behind, a page's neighbour overwritten, memory zeroed after a copy."""
    whole = layout(num_heads, dtype, page_size=page_size)
    buffer = mmap.mmap(-1, 6 * whole.page_bytes)
    host = np.frombuffer(buffer, dtype=np.uint8).reshape(6, -1)
    random = np.random.default_rng(0).integers(1, 256, host.shape, dtype=np.uint8)
    host[:] = random  # before it is touched and registered, which must not write
    register = register_with_driver if DEVICE.type == "cuda" else lambda address, size: None
    memory = PinnedHostMemory(num_pages=6, page_bytes=whole.page_bytes, buffer=buffer, register=register)
    own = layout(max(num_heads // num_ranks, 1), dtype, page_size=page_size)
    ranks: list[tuple[CudaKVMemory, CudaPageCopier]] = []
    for rank in range(num_ranks):
        first = rank * own.num_kv_heads if num_heads >= num_ranks else rank * num_heads // num_ranks
        heads = range(first, first + own.num_kv_heads)
        share = PageShare.of(whole, own, heads=heads, rank=rank, num_ranks=num_ranks)
        kv = CudaKVMemory(own, torch.zeros((NUM_PAGES, own.page_bytes), dtype=torch.uint8, device=DEVICE))
        copier = CudaPageCopier(lambda kv=kv: kv, memory, device=DEVICE, arrivals=Arrivals(), share=share)
        wait(copier.restore(HOST_PAGES, DEVICE_PAGES).copy)
        expected = np.zeros((NUM_PAGES, own.page_bytes), dtype=np.uint8)
        for there, here in zip(share.of_whole(random), share.of_own(expected), strict=True):
            here[DEVICE_PAGES] = there[HOST_PAGES]
        assert np.array_equal(kv.memory.cpu().numpy(), expected)
        ranks.append((kv, copier))
    kept = host[HOST_PAGES]
    host[:] = 0
    for _, copier in ranks:
        wait(copier.offload(DEVICE_PAGES, HOST_PAGES))
    if whole.is_scaled:  # padding behind the exponents, which nobody copies
        kept.reshape(len(HOST_PAGES), 2, -1)[:, :, whole.value_bytes + whole.num_exponents :] = 0
    assert np.array_equal(host[HOST_PAGES], kept)
    assert not host[[1, 2, 3]].any(), "a page that was not asked for is untouched"
    for _, copier in ranks:
        copier.close()
    if DEVICE.type == "cuda":
        memory.close()
