"""Keys and values in 8-bit floats: each token's head with a power of two of its own.

Scaling by a power of two is exact. It moves numbers of any size to where an 8-bit float has all its bits, and needs no
calibration. It depends on the token alone, so the bytes of a page do not depend on batches or chunks.
cuda/float8.py and cuda/kernels/float8.py compute the same.
"""

import numpy as np
import numpy.typing as npt

from headwater.devices.number_formats import narrow, widen

# scaled, the largest number of a head lies in [128, 256): float8_e4m3fn ends at 448
LARGEST_EXPONENT = 7
MIN_EXPONENT = -40  # also of a head of zeros; kernels multiply by the inverse, which must not overflow
_FLOAT32_BIAS, _FLOAT32_MANTISSA_BITS = 127, 23


def to_float8(x: npt.NDArray[np.float32], dtype: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int8]]:
    """[..., D] -> stored values [..., D] of an 8-bit `dtype` and exponents int8[...]: x is values * 2 ** exponents."""
    largest = np.abs(x).max(axis=-1)
    exponents = (largest.view(np.int32) >> _FLOAT32_MANTISSA_BITS) - _FLOAT32_BIAS - LARGEST_EXPONENT
    exponents = np.maximum(exponents, MIN_EXPONENT)
    return narrow(x * power_of_two(-exponents)[..., None], dtype), exponents.astype(np.int8)


def from_float8(stored: npt.NDArray[np.uint8], exponents: npt.NDArray[np.int8], dtype: str) -> npt.NDArray[np.float32]:
    """The inverse of `to_float8`, in float32."""
    with np.errstate(over="ignore", invalid="ignore"):  # heads that held infinity, and garbage in unused pages
        return widen(stored, dtype) * power_of_two(exponents)[..., None]


def power_of_two(exponents: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
    """2 ** exponents, exactly, of integers in [-126, 127]."""
    return ((exponents.astype(np.int32) + _FLOAT32_BIAS) << _FLOAT32_MANTISSA_BITS).view(np.float32)
