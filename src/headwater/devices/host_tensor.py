"""Tensors of a checkpoint in host memory: plain numbers or GGUF blocks, as they lie in the file. numpy alone."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# the numpy type that holds the numbers of each plain format; numpy knows neither bfloat16 nor the 8-bit floats
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
_NUMBERS_AT_ONCE = 1 << 20  # temporary arrays of a conversion stay small beside the tensor
_E4M3_BIAS = 7


@dataclass(frozen=True, slots=True, eq=False)
class HostTensor:
    """Numbers of one format. The holder may keep them but must not change them.

    `format` is a key of STORAGE_TYPES, or the name of a GGUF block format ("Q4_0", "Q6_K"; gguf's own spelling).
    `data` is [*shape] of the storage type; for blocks it is uint8[*shape[:-1], bytes of a row].
    """

    format: str
    shape: tuple[int, ...]
    data: npt.NDArray

    def __post_init__(self) -> None:
        storage = STORAGE_TYPES.get(self.format)
        if storage is None:
            assert self.data.dtype == np.uint8 and self.data.shape[:-1] == self.shape[:-1] and self.shape
        else:
            assert self.data.dtype == storage and self.data.shape == self.shape

    @classmethod
    def of(cls, values: npt.NDArray) -> "HostTensor":
        """Numbers of a type that numpy knows."""
        return cls(values.dtype.name, values.shape, values)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def has_blocks(self) -> bool:
        """Whether several numbers of a row share a scale, as in GGUF's formats."""
        return self.format not in STORAGE_TYPES

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The numbers, float32[shape]; the tensor's own array if it holds float32. ValueError for unknown blocks."""
        if self.format == "float32":
            return self.data
        if self.has_blocks:
            return _dequantised(self.data, self.format).reshape(self.shape)
        return _converted(self.data, _WIDEN.get(self.format, _cast_to(np.float32)), np.dtype(np.float32))

    def astype(self, name: str) -> "HostTensor":
        """The same numbers as float32, bfloat16 or float16, rounded to the nearest, ties to even."""
        if name == self.format:
            return self
        if name not in _NARROW:
            raise ValueError(f"weights are converted to {', '.join(_NARROW)}, not to {name!r}")
        return HostTensor(name, self.shape, _converted(self.to_float32(), _NARROW[name], STORAGE_TYPES[name]))

    def rows(self, start: int, stop: int) -> "HostTensor":
        """Rows [start, stop) of the outermost dimension, a view where possible."""
        return self._pick(slice(start, stop))

    def take_rows(self, order: npt.NDArray[np.integer]) -> "HostTensor":
        """A copy with the rows `order`, in that order. Blocks lie within a row, so they stay whole."""
        return self._pick(order)

    def _pick(self, rows: slice | npt.NDArray[np.integer]) -> "HostTensor":
        if self.has_blocks and len(self.shape) == 1:  # a vector's blocks hold several of its rows
            return HostTensor.of(self.to_float32()[rows])
        data = self.data[rows]
        return HostTensor(self.format, (len(data), *self.shape[1:]), data)


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """Normally distributed numbers that a device makes itself; each kind of device has numbers of its own."""

    shape: tuple[int, ...]
    seed: int
    scale: float

    def to_host(self) -> HostTensor:
        generator = np.random.Generator(np.random.SFC64(self.seed))
        values = generator.standard_normal(self.shape, dtype=np.float32)
        values *= np.float32(self.scale)
        return HostTensor.of(values)


def _dequantised(data: npt.NDArray, name: str) -> npt.NDArray[np.float32]:
    from gguf import GGMLQuantizationType  # slow to import, and most tensors are plain
    from gguf.quants import dequantize

    try:
        return dequantize(data, GGMLQuantizationType[name]).astype(np.float32, copy=False)
    except (NotImplementedError, KeyError) as error:
        raise ValueError(f"numbers of format {name!r} cannot be read: {error}") from None


def _converted(data: npt.NDArray, convert: Callable[[npt.NDArray], npt.NDArray], to: np.dtype) -> npt.NDArray:
    """`convert` of each number, some at a time. Other Python threads run meanwhile."""
    out = np.empty(data.shape, dtype=to)
    flat_in, flat_out = data.reshape(-1), out.reshape(-1)
    for at in range(0, len(flat_in), _NUMBERS_AT_ONCE):
        flat_out[at : at + _NUMBERS_AT_ONCE] = convert(flat_in[at : at + _NUMBERS_AT_ONCE])
    return out


def _cast_to(to: type[np.number]) -> Callable[[npt.NDArray], npt.NDArray]:
    def cast(values: npt.NDArray) -> npt.NDArray:
        with np.errstate(over="ignore"):  # what is too large for 16 bits becomes infinite
            return values.astype(to)

    return cast


def _widen_bfloat16(bits: npt.NDArray) -> npt.NDArray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _widen_e5m2(bits: npt.NDArray) -> npt.NDArray:
    return (bits.astype(np.uint16) << 8).view(np.float16).astype(np.float32)  # the upper half of a float16


def _widen_e4m3(bits: npt.NDArray) -> npt.NDArray:
    return _E4M3[bits]


def _narrow_to_bfloat16(values: npt.NDArray) -> npt.NDArray:
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)  # rounding could make a NaN infinite


def _e4m3_values() -> npt.NDArray[np.float32]:
    """The number of each of the 256 bytes; this format has no infinity (arXiv 2209.05433)."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, (bits & 7) / 8
    sizes = np.where(exponent == 0, np.ldexp(mantissa, 1 - _E4M3_BIAS), np.ldexp(1 + mantissa, exponent - _E4M3_BIAS))
    sizes[(bits & 127) == 127] = np.nan
    return np.where(bits < 128, sizes, -sizes).astype(np.float32)


_E4M3 = _e4m3_values()
_WIDEN = {"bfloat16": _widen_bfloat16, "float8_e5m2": _widen_e5m2, "float8_e4m3fn": _widen_e4m3}
_NARROW = {"float32": _cast_to(np.float32), "bfloat16": _narrow_to_bfloat16, "float16": _cast_to(np.float16)}
