"""The paged KV memory of a device and the layout of its pages."""

from dataclasses import dataclass
from typing import Any, Protocol

from headwater.devices.number_formats import STORAGE_TYPES

FLOAT8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
KV_DTYPES = ("float32", "bfloat16", "float16", *FLOAT8_DTYPES)
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
    dtype: str  # one of KV_DTYPES

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1, found {self.page_size}")
        if self.dtype not in KV_DTYPES:
            raise ValueError(f"keys and values are {', '.join(KV_DTYPES)}, not {self.dtype!r}")

    @property
    def page_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return STORAGE_TYPES[self.dtype].itemsize

    @property
    def num_exponents(self) -> int:
        """Heads of keys and values in one layer of a page, each of which has an exponent if the layout is scaled."""
        return 2 * self.num_kv_heads * self.page_size

    @property
    def value_bytes(self) -> int:
        """Bytes of the keys and values in one layer of a page, without exponents."""
        return self.num_exponents * self.head_dim * self.itemsize

    @property
    def is_scaled(self) -> bool:
        """Whether every token's head has a power of two of its own."""
        return self.dtype in FLOAT8_DTYPES

    @property
    def layer_bytes(self) -> int:
        if not self.is_scaled:
            return self.value_bytes
        num_bytes = self.value_bytes + self.num_exponents
        return num_bytes + -num_bytes % _LAYER_ALIGNMENT

    @property
    def page_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def token_bytes(self) -> float:
        return self.page_bytes / self.page_size


class KVMemory(Protocol):
    """Pages of one layout. Owns the memory, but does not know who uses which page.

    Arrays are numpy's on a CPU (cpu/kv_memory.py) and PyTorch's on a GPU (cuda/kv_memory.py). `pages` and `exponents`
    (None unless the layout is scaled) are views of `memory`: [num_pages, num_layers, 2, num_kv_heads, page_size,
    head_dim] and the same without head_dim.
    """

    @property
    def layout(self) -> KVLayout: ...

    @property
    def memory(self) -> Any:
        """uint8[num_pages, page_bytes]"""
        ...

    @property
    def pages(self) -> Any: ...

    @property
    def exponents(self) -> Any: ...

    @property
    def num_pages(self) -> int: ...

    @property
    def num_bytes(self) -> int: ...


def num_pages_in_budget(budget_bytes: int, layout: KVLayout) -> int:
    """How many pages fit in `budget_bytes`; ValueError if none does."""
    num_pages = budget_bytes // layout.page_bytes
    if num_pages < 1:
        raise ValueError(
            f"the KV memory of {budget_bytes} bytes holds no page: one page of {layout.page_size} tokens "
            f"takes {layout.page_bytes} bytes"
        )
    return num_pages
