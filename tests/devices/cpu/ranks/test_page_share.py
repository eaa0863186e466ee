"""Host memory is that of a single process, whatever the number of ranks: a store must not depend on it."""

import time

import numpy as np
import pytest

from headwater.devices.cpu.host_memory import CpuPageCopier, HostMemory, ThreadCopy
from headwater.devices.cpu.kv_memory import CpuKVMemory
from headwater.devices.cpu.ranks.page_share import PageShare
from headwater.devices.kv_memory import KVLayout
from headwater.models.ranks.share import ModelShare

NUM_PAGES = 5
DEVICE_PAGES = np.array([3, 1, 2], dtype=np.int32)
HOST_PAGES = np.array([0, 4, 5], dtype=np.int32)


def layout(num_kv_heads: int, dtype: str) -> KVLayout:
    return KVLayout(num_layers=2, num_kv_heads=num_kv_heads, head_dim=8, page_size=3, dtype=dtype)


def wait(copy: ThreadCopy) -> None:
    deadline_s = time.monotonic() + 20
    while not copy.is_done():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    assert not copy.has_failed


class _Config:
    """What `ModelShare.kv_heads` reads of a model."""

    def __init__(self, num_kv_heads: int) -> None:
        self.num_kv_heads = num_kv_heads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize(("num_heads", "num_ranks"), [(4, 1), (4, 2), (6, 3), (2, 4), (1, 2)])
def test_ranks_write_and_read_the_pages_of_one_process(num_heads: int, num_ranks: int, dtype: str) -> None:
    """A head at another head's place, exponents left behind, or a rank that overwrites what it does not hold."""
    whole = CpuKVMemory(layout(num_heads, dtype), NUM_PAGES)
    whole.memory[:] = np.random.default_rng(0).integers(1, 256, whole.memory.shape, dtype=np.uint8)
    if whole.exponents is not None:  # what lies behind the exponents is padding, which nobody copies
        values, num = whole.layout.value_bytes, whole.layout.num_exponents
        whole.memory.reshape(NUM_PAGES, 2, -1)[:, :, values + num :] = 0
    host = HostMemory(num_pages=6, page_bytes=whole.layout.page_bytes)
    memories, copiers = [], []
    for rank in range(num_ranks):
        heads = ModelShare(rank, num_ranks).kv_heads(_Config(num_heads))  # type: ignore[arg-type]
        own = CpuKVMemory(layout(len(heads), dtype), NUM_PAGES)
        own.pages[:] = whole.pages[:, :, :, heads.start : heads.stop]
        if own.exponents is not None and whole.exponents is not None:
            own.exponents[:] = whole.exponents[:, :, :, heads.start : heads.stop]
        share = PageShare.of(whole.layout, own.layout, heads=heads, rank=rank, num_ranks=num_ranks)
        memories.append(own)
        copiers.append(CpuPageCopier(lambda own=own: own, host, share=share))
    for copier in copiers:
        wait(copier.offload(DEVICE_PAGES, HOST_PAGES))
    assert np.array_equal(host.pages[HOST_PAGES], whole.memory[DEVICE_PAGES])
    assert not host.pages[[1, 2, 3]].any(), "other pages stay as they were"
    for own, copier in zip(memories, copiers, strict=True):
        before = own.memory.copy()
        own.memory[:] = 0
        wait(copier.restore(HOST_PAGES, DEVICE_PAGES))
        assert np.array_equal(own.memory[DEVICE_PAGES], before[DEVICE_PAGES])
        copier.close()
