"""The layout of KV pages: a page is one run of bytes."""

import numpy as np
import pytest

from headwater.devices.cpu.kv_memory import CpuKVMemory
from headwater.devices.kv_memory import KVLayout, num_pages_in_budget

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, page_size=4, dtype="bfloat16")


def test_a_copied_page_is_the_same_page() -> None:
    """Tiers copy the bytes of one page; a stride into a neighbour would mix requests."""
    kv = CpuKVMemory(LAYOUT, 5)
    assert kv.num_bytes == 5 * LAYOUT.page_bytes == 5 * 3 * 2 * 2 * 4 * 8 * 2
    kv.pages[:] = np.random.default_rng(0).integers(0, 1 << 16, kv.pages.shape, dtype=np.uint16)
    before = kv.pages.copy()
    kv.memory[1] = kv.memory[4]
    assert np.array_equal(kv.pages[1], before[4])
    assert np.array_equal(kv.pages[[0, 2, 3, 4]], before[[0, 2, 3, 4]])


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_exponents_lie_behind_the_values_of_their_layer(page_size: int) -> None:
    """A layer that reached into the next, or values that did not begin at 16 bytes, would mix layers or break loads."""
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=24, page_size=page_size, dtype="float8_e4m3fn")
    assert layout.layer_bytes % 16 == 0
    kv = CpuKVMemory(layout, 4)
    assert kv.exponents is not None
    kv.pages[2, 1], kv.exponents[2, 1] = 0x38, 7
    layers = kv.memory.reshape(4, 3, -1)
    num_heads = 2 * 2 * page_size
    assert (layers[2, 1, : num_heads * 24] == 0x38).all()
    assert (layers[2, 1, num_heads * 24 : num_heads * 25] == 7).all()
    assert np.count_nonzero(layers) == num_heads * 25


def test_a_layout_knows_its_numbers_by_name() -> None:
    sizes = {dtype: KVLayout(1, 1, 16, 1, dtype).itemsize for dtype in ("float32", "bfloat16", "float16")}
    assert sizes == {"float32": 4, "bfloat16": 2, "float16": 2}
    with pytest.raises(ValueError, match="not 'int8'"):
        KVLayout(1, 1, 16, 1, "int8")


def test_budget_in_pages() -> None:
    assert num_pages_in_budget(LAYOUT.page_bytes * 7 + 5, LAYOUT) == 7
    with pytest.raises(ValueError, match=f"takes {LAYOUT.page_bytes} bytes"):
        num_pages_in_budget(LAYOUT.page_bytes - 1, LAYOUT)
