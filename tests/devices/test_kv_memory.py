"""The layout of KV pages: a page is one run of bytes."""

import pytest
import torch

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.kv_memory import KVLayout, num_pages_in_budget

pytestmark = pytest.mark.slow

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, page_size=4, dtype=torch.bfloat16)


def test_a_copied_page_is_the_same_page() -> None:
    """Tiers copy the bytes of one page; a stride into a neighbour would mix requests."""
    kv = CpuDevice().allocate_kv(LAYOUT, 5)
    assert kv.num_bytes == 5 * LAYOUT.page_bytes == 5 * 3 * 2 * 2 * 4 * 8 * 2
    kv.pages.normal_()
    before = kv.pages.clone()
    kv.page_as_bytes(1).copy_(kv.page_as_bytes(4).clone())
    assert torch.equal(kv.pages[1], before[4])
    assert torch.equal(kv.pages[[0, 2, 3, 4]], before[[0, 2, 3, 4]])


def test_budget_in_pages() -> None:
    assert num_pages_in_budget(LAYOUT.page_bytes * 7 + 5, LAYOUT) == 7
    with pytest.raises(ValueError, match=f"takes {LAYOUT.page_bytes} bytes"):
        num_pages_in_budget(LAYOUT.page_bytes - 1, LAYOUT)
