"""Arrays that give their memory back to the system when they are freed. numpy alone.

malloc keeps much of what it has once given out, for each thread. While a model is loaded that would be a third of its
size.
"""

import math
import mmap

import numpy as np
import numpy.typing as npt

_LEAST_BYTES = 1 << 18


def empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray:
    """numpy's `empty`; large arrays have a mapping of their own."""
    of_type = np.dtype(dtype)
    num_bytes = math.prod(shape) * of_type.itemsize
    if num_bytes < _LEAST_BYTES:
        return np.empty(shape, dtype=of_type)
    return np.frombuffer(mmap.mmap(-1, num_bytes), dtype=of_type).reshape(shape)
