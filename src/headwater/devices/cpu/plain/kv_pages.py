"""One layer's keys and values in KV pages (devices/kv_memory.py), read and written in numpy."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.plain.norm import Floats
from headwater.devices.number_formats import STORAGE_TYPES, narrow, widen

KEY, VALUE = 0, 1
LARGEST_EXPONENT, MIN_EXPONENT = 7, -40  # as in devices/float8.py
_NOT_FINITE = 128 - LARGEST_EXPONENT  # the exponent of a head with NaN or infinity


@dataclass(frozen=True, slots=True)
class LayerPages:
    """Where one layer lies in the pages. The shape is that of KVLayout; `dtype` is a name of number_formats.py."""

    memory: npt.NDArray[np.uint8]  # [num_pages, page_bytes]
    layer_offset: int  # bytes from the start of a page
    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: str

    @property
    def is_scaled(self) -> bool:
        """Whether every token's head has a power of two of its own."""
        return self.dtype.startswith("float8")

    def read(self, which: int, pages: npt.NDArray[np.int32], num_tokens: int) -> Floats:
        """Keys (0) or values (1) of the first `num_tokens` tokens of a page table's row: [G, num_tokens, D]."""
        pages = pages[: -(-num_tokens // self.page_size)]
        found = widen(self.stored(which)[pages], self.dtype)  # [pages, G, page_size, D]
        if self.is_scaled:
            exponents = self._exponents()[pages, which]
            powers = np.where(exponents >= _NOT_FINITE, np.float32("nan"), np.ldexp(np.float32(1), exponents))
            found = found * powers[..., None]
        return found.transpose(1, 0, 2, 3).reshape(self.num_kv_heads, -1, self.head_dim)[:, :num_tokens]

    def write(self, which: int, x: Floats, pages: npt.NDArray[np.int32], offsets: npt.NDArray[np.int32]) -> None:
        """Store keys or values [T, G, D], token t at `offsets[t]` of page `pages[t]`."""
        if self.is_scaled:
            exponents = (np.abs(x).max(axis=-1).view(np.int32) >> 23) - 127
            exponents = np.maximum(exponents - LARGEST_EXPONENT, MIN_EXPONENT)
            self._exponents()[pages, which, :, offsets] = exponents
            x = x * np.ldexp(np.float32(1), -exponents)[..., None]
        self.stored(which)[pages, :, offsets] = narrow(x, self.dtype)

    def stored(self, which: int) -> npt.NDArray:
        """A view of all stored keys (0) or values (1): [num_pages, G, page_size, D]."""
        return self._all_numbers()[:, which]

    def _all_numbers(self) -> npt.NDArray:
        """A view of the stored numbers: [num_pages, 2, G, page_size, D]."""
        shape = (2, self.num_kv_heads, self.page_size, self.head_dim)
        return self._part(self.layer_offset, STORAGE_TYPES[self.dtype], shape)

    def _exponents(self) -> npt.NDArray[np.int8]:
        """A view of the exponents behind the 8-bit numbers: [num_pages, 2, G, page_size]."""
        shape = (2, self.num_kv_heads, self.page_size)
        return self._part(self.layer_offset + int(np.prod(shape)) * self.head_dim, np.dtype(np.int8), shape)

    def _part(self, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> npt.NDArray:
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        return self.memory[:, start : start + num_bytes].view(dtype).reshape(-1, *shape)
