"""The formats of numbers in host memory by name, and their conversion to and from float32. numpy alone.

numpy knows neither bfloat16 nor 8-bit floats; arrays of these hold the numbers' bits as unsigned integers.
"""

import numpy as np
import numpy.typing as npt

# the numpy type that holds a format's numbers or bits
STORAGE_TYPES: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "float8_e4m3fn": np.dtype(np.uint8),
    "float8_e5m2": np.dtype(np.uint8),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
_FLOAT32_BIAS, _FLOAT32_MANTISSA_BITS = 127, 23


def widen(stored: npt.NDArray, name: str) -> npt.NDArray[np.float32]:
    """Stored numbers of the format `name` as float32: exact but for 64-bit numbers and large integers."""
    if name == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if name in _FLOAT8:
        return _FLOAT8_VALUES[name][stored]
    return stored.astype(np.float32)


def narrow(values: npt.NDArray[np.float32], name: str) -> npt.NDArray:
    """float32 as stored numbers of a float format, rounded to the nearest, ties to even.

    What is too large becomes infinite, or the largest number of float8_e4m3fn, which has no infinity.
    """
    if name == "bfloat16":
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)  # rounding could make a NaN infinite
    if name in _FLOAT8:
        return _narrow_to_float8(values, name)
    if name not in ("float32", "float16"):
        raise ValueError(f"float32 is not converted to {name!r}")
    with np.errstate(over="ignore"):
        return values.astype(STORAGE_TYPES[name])


# mantissa bits, bias, and the byte of what is too large (arXiv 2209.05433)
_FLOAT8 = {"float8_e4m3fn": (3, 7, 0x7E), "float8_e5m2": (2, 15, 0x7C)}
_NAN = 0x7F


def _narrow_to_float8(values: npt.NDArray[np.float32], name: str) -> npt.NDArray[np.uint8]:
    mantissa_bits, bias, overflow = _FLOAT8[name]
    sizes = np.abs(values)
    bits = sizes.view(np.uint32)
    shift = _FLOAT32_MANTISSA_BITS - mantissa_bits
    rounded = (bits + ((1 << (shift - 1)) - 1) + ((bits >> shift) & 1)) >> shift
    normal = rounded.astype(np.int32) - ((_FLOAT32_BIAS - bias) << mantissa_bits)
    with np.errstate(over="ignore", invalid="ignore"):
        subnormal = np.rint(sizes * np.float32(2.0 ** (bias - 1 + mantissa_bits)))
        is_subnormal = sizes < 2.0 ** (1 - bias)
    codes = np.where(is_subnormal, np.where(is_subnormal, subnormal, 0).astype(np.int32), normal)
    codes = np.where(np.isnan(values), _NAN, np.minimum(codes, overflow))
    return (codes | (np.signbit(values) << 7)).astype(np.uint8)


def _float8_values(name: str) -> npt.NDArray[np.float32]:
    """The number of each of the 256 bytes."""
    mantissa_bits, bias, overflow = _FLOAT8[name]
    codes = np.arange(128)
    exponents, mantissas = codes >> mantissa_bits, (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    sizes = np.ldexp(np.where(exponents == 0, mantissas, 1 + mantissas), np.maximum(exponents, 1) - bias)
    sizes[codes > overflow] = np.nan
    if name == "float8_e5m2":
        sizes[overflow] = np.inf
    return np.concatenate((sizes, -sizes)).astype(np.float32)


_FLOAT8_VALUES = {name: _float8_values(name) for name in _FLOAT8}
