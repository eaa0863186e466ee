"""The paged KV memory of a device and the layout of its pages."""

from dataclasses import dataclass

import torch

FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_LAYER_ALIGNMENT = 16  # bytes; kernels load and copy that much at a time


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one page holds: keys and values of `page_size` tokens, of all layers, on one device.

    A page's bytes are one contiguous run of layers, so that a tier copies a page, or a layer of it, with one copy. A
    layer is [2 (K, V), num_kv_heads, page_size, head_dim] of `dtype`. If that has 8 bits, int8[2, num_kv_heads,
    page_size] follow, padded to 16 bytes: the exponent of the power of two that scales each token's head (float8.py).
    Keys are stored after rotary embedding and QK-norm.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1, found {self.page_size}")

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def is_scaled(self) -> bool:
        """Whether every token's head has a power of two of its own."""
        return self.dtype in FLOAT8_DTYPES

    @property
    def layer_bytes(self) -> int:
        num_heads = 2 * self.num_kv_heads * self.page_size
        num_bytes = num_heads * self.head_dim * self.dtype.itemsize
        if self.is_scaled:
            num_bytes += num_heads + -(num_bytes + num_heads) % _LAYER_ALIGNMENT
        return num_bytes

    @property
    def page_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def token_bytes(self) -> float:
        return self.page_bytes / self.page_size


class KVMemory:
    """Pages of one layout. Owns the memory, but does not know who uses which page.

    `memory` may come in any shape and dtype, contiguous; it is kept as uint8[num_pages, page_bytes]. `pages` and
    `exponents` (None unless the layout is scaled) are views of it: [num_pages, num_layers, 2, num_kv_heads, page_size,
    head_dim] and the same without head_dim. Both have the strides of the memory.
    """

    def __init__(self, layout: KVLayout, memory: torch.Tensor) -> None:
        assert memory.is_contiguous() and memory.nbytes % layout.page_bytes == 0
        self.layout = layout
        self.memory = memory.view(-1).view(torch.uint8).view(-1, layout.page_bytes)
        layers = self.memory.view(-1, layout.num_layers, layout.layer_bytes)
        num_heads = 2 * layout.num_kv_heads * layout.page_size
        num_bytes = num_heads * layout.head_dim * layout.dtype.itemsize
        self.pages = layers[..., :num_bytes].view(layout.dtype).unflatten(-1, layout.page_shape[1:])
        self.exponents: torch.Tensor | None = None
        if layout.is_scaled:
            exponents = layers[..., num_bytes : num_bytes + num_heads].view(torch.int8)
            self.exponents = exponents.unflatten(-1, layout.page_shape[1:-1])

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.num_pages * self.layout.page_bytes

    def page_as_bytes(self, page: int) -> torch.Tensor:
        """A writable view of one page, uint8[page_bytes]."""
        return self.memory[page]


def num_pages_in_budget(budget_bytes: int, layout: KVLayout) -> int:
    """How many pages fit in `budget_bytes`; ValueError if none does."""
    num_pages = budget_bytes // layout.page_bytes
    if num_pages < 1:
        raise ValueError(
            f"the KV memory of {budget_bytes} bytes holds no page: one page of {layout.page_size} tokens "
            f"takes {layout.page_bytes} bytes"
        )
    return num_pages
