"""The paged KV memory of a device and the layout of its pages."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What one page holds: keys and values of `page_size` tokens, of all layers, on one device.

    A page's bytes are one contiguous run [num_layers, 2 (K, V), num_kv_heads, page_size, head_dim] of `dtype`,
    so that a tier copies a page with one copy. Keys are stored after rotary embedding and QK-norm.
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
    def token_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.token_bytes * self.page_size


class KVMemory:
    """`num_pages` pages of one layout. Owns the memory; knows nothing of who uses which page.

    `pages` is [num_pages, num_layers, 2, num_kv_heads, page_size, head_dim].
    """

    def __init__(self, layout: KVLayout, pages: torch.Tensor) -> None:
        assert pages.shape[1:] == layout.page_shape and pages.dtype == layout.dtype and pages.is_contiguous()
        self.layout = layout
        self.pages = pages

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.num_pages * self.layout.page_bytes

    def page_as_bytes(self, page: int) -> torch.Tensor:
        """A writable view of one page, uint8[page_bytes]."""
        return self.pages[page].view(-1).view(torch.uint8)


def num_pages_in_budget(budget_bytes: int, layout: KVLayout) -> int:
    """How many pages fit in `budget_bytes`; ValueError if none does."""
    num_pages = budget_bytes // layout.page_bytes
    if num_pages < 1:
        raise ValueError(
            f"the KV memory of {budget_bytes} bytes holds no page: one page of {layout.page_size} tokens "
            f"takes {layout.page_bytes} bytes"
        )
    return num_pages
