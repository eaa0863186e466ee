"""Tensors of a checkpoint in host memory: plain numbers or GGUF blocks, as they lie in the file. numpy alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.devices.number_formats import STORAGE_TYPES, narrow, widen
from headwater.devices.own_memory import empty

_NUMBERS_AT_ONCE = 1 << 20  # temporary arrays of a conversion stay small beside the tensor
_TARGETS = ("float32", "bfloat16", "float16")


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

    def arrays(self) -> list[npt.NDArray]:
        """All that it holds."""
        return [self.data]

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The numbers, float32[shape]; the tensor's own array if it holds float32. ValueError for unknown blocks."""
        if self.format == "float32":
            return self.data
        if self.has_blocks:
            return _dequantised(self.data, self.format).reshape(self.shape)
        return _converted(self.data, lambda part: widen(part, self.format), np.dtype(np.float32))

    def astype(self, name: str) -> "HostTensor":
        """The same numbers as float32, bfloat16 or float16, rounded to the nearest, ties to even."""
        if name == self.format:
            return self
        if name not in _TARGETS:
            raise ValueError(f"weights are converted to {', '.join(_TARGETS)}, not to {name!r}")
        return HostTensor(
            name, self.shape, _converted(self.to_float32(), lambda part: narrow(part, name), STORAGE_TYPES[name])
        )

    def rows(self, start: int, stop: int) -> "HostTensor":
        """Rows [start, stop) of the outermost dimension, a view where possible."""
        return self._pick(slice(start, stop))

    def take_ranges(self, ranges: Sequence[range]) -> "HostTensor":
        """A copy of the rows of several ranges, one after another."""
        return joined_rows([self.rows(each.start, each.stop) for each in ranges])

    def take_rows(self, order: npt.NDArray[np.integer]) -> "HostTensor":
        """A copy with the rows `order`, in that order. Blocks lie within a row, so they stay whole."""
        return self._pick(order)

    def columns(self, start: int, stop: int) -> "HostTensor":
        """Columns [start, stop) of a matrix, a view. ValueError if a block would be cut."""
        if not self.has_blocks:
            return HostTensor(self.format, (self.shape[0], stop - start), self.data[:, start:stop])
        num_numbers, num_bytes = _block_size(self.format)
        if start % num_numbers or stop % num_numbers:
            raise ValueError(f"its {self.format} blocks of {num_numbers} inputs cannot be cut at {start} and {stop}")
        first, end = (at // num_numbers * num_bytes for at in (start, stop))
        return HostTensor(self.format, (self.shape[0], stop - start), self.data[:, first:end])

    def _pick(self, rows: slice | npt.NDArray[np.integer]) -> "HostTensor":
        if self.has_blocks and len(self.shape) == 1:  # a vector's blocks hold several of its rows
            return HostTensor.of(self.to_float32()[rows])
        data = self.data[rows]
        return HostTensor(self.format, (len(data), *self.shape[1:]), data)


def joined_rows(parts: Sequence[HostTensor]) -> HostTensor:
    """The rows of all parts, one after another; a copy. All have one format."""
    data = np.concatenate([part.data for part in parts])
    return HostTensor(parts[0].format, (len(data), *parts[0].shape[1:]), data)


@dataclass(frozen=True, slots=True)
class RandomTensor:
    """Normally distributed numbers that a device makes itself; each kind of device has numbers of its own.

    A part of a tensor has the numbers of the whole: `part` are its rows and columns, empty for all. `ranges` are its
    rows where they do not follow each other.
    """

    whole: tuple[int, ...]
    seed: int
    scale: float
    part: tuple[slice, ...] = ()
    ranges: tuple[range, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        if self.ranges:
            return (sum(map(len, self.ranges)), *self.whole[1:])
        cut = tuple(part.stop - part.start for part in self.part)
        return cut + self.whole[len(cut) :]

    def rows(self, start: int, stop: int) -> "RandomTensor":
        return replace(self, part=(slice(start, stop),))

    def columns(self, start: int, stop: int) -> "RandomTensor":
        return replace(self, part=(slice(0, self.whole[0]), slice(start, stop)))

    def take_ranges(self, ranges: Sequence[range]) -> "RandomTensor":
        return replace(self, ranges=tuple(ranges))

    def of_whole(self, values: Any) -> Any:
        """Its part of the numbers of the whole, an array of numpy or of PyTorch."""
        return values[np.concatenate([np.array(each) for each in self.ranges])] if self.ranges else values[self.part]

    def to_host(self) -> HostTensor:
        generator = np.random.Generator(np.random.SFC64(self.seed))
        values = self.of_whole(generator.standard_normal(self.whole, dtype=np.float32))
        values *= np.float32(self.scale)
        return HostTensor.of(values)


def _block_size(name: str) -> tuple[int, int]:
    """Numbers and bytes of a block of GGUF."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # slow to import, and most tensors are plain

    return GGML_QUANT_SIZES[GGMLQuantizationType[name]]


def _dequantised(data: npt.NDArray, name: str) -> npt.NDArray[np.float32]:
    from gguf import GGMLQuantizationType  # slow to import, and most tensors are plain
    from gguf.quants import dequantize

    if name not in GGMLQuantizationType.__members__:
        raise ValueError(f"numbers of format {name!r} cannot be read: GGUF has no such type")
    try:
        return dequantize(data, GGMLQuantizationType[name]).astype(np.float32, copy=False)
    except NotImplementedError as error:  # a type of GGUF that its package only names
        raise ValueError(f"numbers of format {name!r} cannot be read: {error}") from error


def _converted(data: npt.NDArray, convert: Callable[[npt.NDArray], npt.NDArray], to: np.dtype) -> npt.NDArray:
    """`convert` of each number, some at a time. Other Python threads run meanwhile."""
    out = empty(data.shape, to)
    flat_in, flat_out = data.reshape(-1), out.reshape(-1)
    for at in range(0, len(flat_in), _NUMBERS_AT_ONCE):
        flat_out[at : at + _NUMBERS_AT_ONCE] = convert(flat_in[at : at + _NUMBERS_AT_ONCE])
    return out
