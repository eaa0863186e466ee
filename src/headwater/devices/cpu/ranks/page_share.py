"""What a rank holds of each page: some KV heads. Host memory has whole pages, as if one process computed the model.

So a page in a store, which is what host memory held, does not depend on the number of ranks.
"""

import mmap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headwater.devices.kv_memory import KVLayout

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PageShare:
    """A rank's KV heads of pages that have the layout `whole`."""

    whole: KVLayout
    own: KVLayout
    first_head: int
    is_writer: bool = True  # False: another rank holds the same heads, and writes them

    @classmethod
    def of(cls, whole: KVLayout, own: KVLayout, *, heads: range, rank: int, num_ranks: int) -> "PageShare":
        """The share of a rank. Where ranks are more than heads, the first rank of a head writes it."""
        num_holders = max(num_ranks // whole.num_kv_heads, 1)
        return cls(whole, own, first_head=heads.start, is_writer=rank % num_holders == 0)

    def of_whole(self, pages: Bytes) -> list[Bytes]:
        """Views of this rank's part of uint8[num_pages, whole page_bytes]: values, then exponents if there are any."""
        return _views(pages, self.whole, first_head=self.first_head, num_heads=self.own.num_kv_heads)

    def of_own(self, pages: Bytes) -> list[Bytes]:
        """The same views of uint8[num_pages, own page_bytes]."""
        return _views(pages, self.own, first_head=0, num_heads=self.own.num_kv_heads)


@dataclass(frozen=True, slots=True)
class SharedPages:
    """Host memory of whole pages that all ranks map, and what this rank has of each."""

    buffer: mmap.mmap
    share: PageShare


def _views(pages: Bytes, layout: KVLayout, *, first_head: int, num_heads: int) -> list[Bytes]:
    """Each uint8[num_pages, num_layers, 2 (K, V), bytes of the heads]."""
    layers = pages.reshape(len(pages), layout.num_layers, layout.layer_bytes)
    tokens = layout.page_size * layout.head_dim * layout.itemsize
    spans = [(0, layout.value_bytes, tokens)]
    if layout.is_scaled:
        spans.append((layout.value_bytes, layout.value_bytes + layout.num_exponents, layout.page_size))
    found = []
    for start, stop, head_bytes in spans:
        heads = layers[:, :, start:stop].reshape(len(pages), layout.num_layers, 2, -1)
        assert np.shares_memory(heads, pages) or not pages.size, "a view, not a copy"
        found.append(heads[..., first_head * head_bytes : (first_head + num_heads) * head_bytes])
    return found
