"""The KV memory of a CPU: numpy."""

import numpy as np
import numpy.typing as npt

from headwater.devices.kv_memory import KVLayout
from headwater.devices.number_formats import STORAGE_TYPES

_LINE_BYTES = 64


class CpuKVMemory:
    """Pages of one layout (devices.kv_memory.KVMemory). `pages` holds bfloat16 and 8-bit floats by their bits.

    Zeroed memory is allocated on first write.
    """

    def __init__(self, layout: KVLayout, num_pages: int) -> None:
        self.layout = layout
        # numpy asks for huge pages: copies to and from the host tier are a third faster with them
        whole = np.zeros(num_pages * layout.page_bytes + _LINE_BYTES, dtype=np.uint8)
        first = -whole.ctypes.data % _LINE_BYTES  # else each vector of a key lies in two lines of the cache
        self.memory: npt.NDArray[np.uint8] = whole[first : first + num_pages * layout.page_bytes].reshape(
            num_pages, layout.page_bytes
        )
        layers = self.memory.reshape(num_pages, layout.num_layers, layout.layer_bytes)
        shape = (num_pages, *layout.page_shape)
        self.pages = _view(layers[..., : layout.value_bytes], STORAGE_TYPES[layout.dtype], shape)
        self.exponents: npt.NDArray[np.int8] | None = None
        if layout.is_scaled:
            stored = layers[..., layout.value_bytes : layout.value_bytes + layout.num_exponents]
            self.exponents = _view(stored, np.dtype(np.int8), shape[:-1])

    @property
    def num_pages(self) -> int:
        return len(self.memory)

    @property
    def num_bytes(self) -> int:
        return self.memory.nbytes


def _view(stored: npt.NDArray[np.uint8], dtype: np.dtype, shape: tuple[int, ...]) -> npt.NDArray:
    """uint8[num_pages, num_layers, bytes] as `shape` of `dtype`, without a copy."""
    found = stored.view(dtype).reshape(shape)
    assert np.shares_memory(found, stored)
    return found
