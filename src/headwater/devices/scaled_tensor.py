"""Matrices of 4-bit or 8-bit codes with a scale for each tile, as quantised checkpoints hold them. numpy alone.

A number is code * scale + offset; without offsets, codes of 4 bits stand for -8 to 7. A tile is some outputs by some
inputs: a part of a row (int4), a whole row, a square (DeepSeek's float8) or all of the matrix.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from headwater.devices.host_tensor import HostTensor
from headwater.devices.number_formats import STORAGE_TYPES, narrow, widen
from headwater.devices.own_memory import empty

Codes = Literal["int4", "int8", "float8_e4m3fn"]
BLOCK = 32  # of GGUF's Q4_0, Q4_1 and Q8_0
CODE_BLOCKS = frozenset({"Q4_0", "Q4_1", "Q8_0"})  # in which `to_blocks` puts codes
MIDDLE = 8  # the code of 4 bits that stands for 0 where there are no offsets
_HALF_ROUNDING = 2.0**-11  # float16: the largest relative error of a normal number
_NUMBERS_AT_ONCE = 1 << 20  # temporary arrays of a conversion stay small beside the tensor
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class ScaledTensor:
    """A matrix [out, in]. The holder may keep it but must not change it.

    `codes`: int4 uint8[out, in / 2], each byte an even input in its low bits and the next one in its high bits;
    int8 int8[out, in]; float8_e4m3fn uint8[out, in], the bits. `tile`: the outputs and the inputs that share a scale.
    `scales`: float32[tiles of outputs, tiles of inputs]; the last tiles may be smaller. `offsets`: like `scales`, or
    None. `order`: int[in], if column i of the codes is that of input order[i].
    """

    format: Codes
    shape: tuple[int, int]
    codes: npt.NDArray
    scales: Floats
    tile: tuple[int, int]
    offsets: Floats | None = None
    order: npt.NDArray[np.intp] | None = None

    def __post_init__(self) -> None:
        (num_rows, num_columns), (high, wide) = self.shape, self.tile
        assert self.codes.dtype == (np.int8 if self.format == "int8" else np.uint8)
        assert self.codes.shape == (num_rows, num_columns // 2 if self.format == "int4" else num_columns)
        assert self.scales.dtype == np.float32 and self.scales.shape == (-(-num_rows // high), -(-num_columns // wide))
        assert self.offsets is None or (self.offsets.dtype, self.offsets.shape) == (np.float32, self.scales.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, and of scales and offsets in 16 bits."""
        return self.codes.nbytes + self.scales.size * (2 if self.offsets is None else 4)

    def arrays(self) -> list[npt.NDArray]:
        """All that it holds."""
        return [values for values in (self.codes, self.scales, self.offsets, self.order) if values is not None]

    def to_float32(self) -> Floats:
        """The numbers, float32[out, in]."""
        return self._converted(lambda part: part, np.dtype(np.float32))

    def astype(self, name: str) -> HostTensor:
        """The numbers as float32, bfloat16 or float16, rounded to the nearest, ties to even."""
        numbers = self._converted(lambda part: narrow(part, name), STORAGE_TYPES[name])
        return HostTensor(name, self.shape, numbers)

    def rows(self, start: int, stop: int) -> "ScaledTensor":
        """Outputs [start, stop)."""
        high, wide = self.tile
        fine = math.gcd(start, stop, high) if stop < self.shape[0] else math.gcd(start, high)
        cut = slice(start // fine, -(-stop // fine))
        scales, offsets = (self._finer(each, high // fine, axis=0, cut=cut) for each in (self.scales, self.offsets))
        assert scales is not None
        shape = (stop - start, self.shape[1])
        codes = self.codes[start:stop]
        return replace(self, shape=shape, codes=codes, scales=scales, offsets=offsets, tile=(fine, wide))

    def take_ranges(self, ranges: Sequence[range]) -> "ScaledTensor":
        """A copy of the outputs of several ranges, one after another. Their tiles may be smaller."""
        parts = [self.rows(each.start, each.stop) for each in ranges]
        high = math.gcd(*(part.tile[0] for part in parts), *(len(each) for each in ranges[:-1]))
        whole = slice(None)
        scales = [part._finer(part.scales, part.tile[0] // high, axis=0, cut=whole) for part in parts]
        offsets = [part._finer(part.offsets, part.tile[0] // high, axis=0, cut=whole) for part in parts]
        num = [-(-len(each) // high) for each in ranges]
        return replace(
            self,
            shape=(sum(map(len, ranges)), self.shape[1]),
            codes=np.concatenate([part.codes for part in parts]),
            scales=_first_of_each(scales, num),
            offsets=None if self.offsets is None else _first_of_each(offsets, num),
            tile=(high, self.tile[1]),
        )

    def columns(self, start: int, stop: int) -> "ScaledTensor":
        """Inputs [start, stop). ValueError if the codes cannot be cut there."""
        if self.order is not None:
            raise ValueError("its groups of inputs are in the order of activations (desc_act) and cannot be cut")
        per_byte = 2 if self.format == "int4" else 1
        if start % per_byte or stop % per_byte:
            raise ValueError(f"its codes of 4 bits cannot be cut at {start} and {stop}")
        high, wide = self.tile
        fine = math.gcd(start, stop, wide) if stop < self.shape[1] else math.gcd(start, wide)
        cut = slice(start // fine, -(-stop // fine))
        scales, offsets = (self._finer(each, wide // fine, axis=1, cut=cut) for each in (self.scales, self.offsets))
        assert scales is not None
        codes = self.codes[:, start // per_byte : stop // per_byte]
        shape = (self.shape[0], stop - start)
        return replace(self, shape=shape, codes=codes, scales=scales, offsets=offsets, tile=(high, fine))

    def to_blocks(self) -> HostTensor | None:
        """The same numbers in GGUF's blocks of 32: Q4_0, Q4_1 or Q8_0. None if the blocks cannot hold them.

        Scales and offsets become float16, with relative errors up to 2^-11: what checkpoints hold as float16, and
        nearly all bfloat16 numbers, stay exact. Codes are moved.
        """
        (num_rows, num_columns), (high, wide) = self.shape, self.tile
        is_integer = self.format == "int4" or (self.format == "int8" and self.offsets is None)
        if not is_integer or self.order is not None or num_columns % BLOCK:
            return None
        if wide % BLOCK and wide < num_columns:
            return None
        num_blocks, per_tile = num_columns // BLOCK, -(-min(wide, num_columns) // BLOCK)
        halves = [as_float16(values) for values in (self.scales, self.offsets) if values is not None]
        if any(values is None for values in halves):
            return None
        heads = [
            np.repeat(np.repeat(values, high, axis=0)[:num_rows], per_tile, axis=1)[:, :num_blocks]
            for values in halves
            if values is not None
        ]
        head_bytes = 2 * len(heads)
        code_bytes = BLOCK // 2 if self.format == "int4" else BLOCK
        out = empty((num_rows, num_blocks, head_bytes + code_bytes), np.uint8)
        for i, head in enumerate(heads):
            out[:, :, 2 * i : 2 * i + 2] = np.ascontiguousarray(head).view(np.uint8).reshape(num_rows, num_blocks, 2)
        for part in _parts(self.shape):
            codes = self.codes[part].view(np.uint8).reshape(-1, num_blocks, code_bytes)
            (move_pairs if self.format == "int4" else _copy)(codes, out[part, :, head_bytes:])
        name = "Q8_0" if self.format == "int8" else ("Q4_0" if len(heads) == 1 else "Q4_1")
        return HostTensor(name, self.shape, out.reshape(num_rows, -1))

    def _converted(self, convert: Callable[[Floats], npt.NDArray], to: np.dtype) -> npt.NDArray:
        out = empty(self.shape, to)
        for part in _parts(self.shape):
            found = convert(self._numbers(part))
            if self.order is None:
                out[part] = found
            else:
                out[part, self.order] = found
        return out

    def _numbers(self, part: slice) -> Floats:
        """Some rows in float32, in the order of the codes."""
        codes = self.codes[part]
        if self.format == "int4":
            pairs = np.stack((codes & 15, codes >> 4), axis=-1)
            numbers = pairs.reshape(len(codes), -1).astype(np.float32)
        elif self.format == "int8":
            numbers = codes.astype(np.float32)
        else:
            numbers = widen(codes, self.format)
        if self.offsets is None and self.format == "int4":
            numbers -= np.float32(MIDDLE)
        numbers *= self._spread(self.scales, part)
        if self.offsets is not None:
            numbers += self._spread(self.offsets, part)
        return numbers

    def _spread(self, values: npt.NDArray, part: slice) -> npt.NDArray:
        """One value for each number of some rows."""
        high, wide = self.tile
        rows = values[np.arange(part.start, part.stop) // high]
        return rows if rows.shape[1] == 1 else np.repeat(rows, wide, axis=1)[:, : self.shape[1]]

    def _finer(self, values: npt.NDArray | None, times: int, *, axis: int, cut: slice) -> npt.NDArray | None:
        """A part of the values of smaller tiles."""
        if values is None:
            return None
        fine = values if times == 1 else np.repeat(values, times, axis=axis)
        return fine[cut] if axis == 0 else fine[:, cut]


def _parts(shape: tuple[int, int]) -> list[slice]:
    """Rows at a time."""
    step = max(1, _NUMBERS_AT_ONCE // max(1, shape[1]))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def as_float16(values: Floats) -> npt.NDArray[np.float16] | None:
    """None if a number would lose more than a rounding: too large, or too small to be a normal number."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float16)
    with np.errstate(invalid="ignore"):
        is_near = np.abs(found.astype(np.float32) - values) <= np.abs(values) * np.float32(_HALF_ROUNDING)
    return found if is_near.all() else None


def _first_of_each(parts: Sequence[Floats | None], num: Sequence[int]) -> Floats:
    """The first rows of each part, one after another."""
    return np.concatenate([part[:end] for part, end in zip(parts, num, strict=True) if part is not None])


def _copy(codes: Bytes, out: Bytes) -> None:
    out[...] = codes


def move_pairs(codes: Bytes, out: Bytes) -> None:
    """Pairs of neighbours to GGUF's pairs: byte i holds numbers i and i + 16. uint8[..., 16], both"""
    first, second = codes[..., : BLOCK // 4], codes[..., BLOCK // 4 :]
    out[..., 0::2] = (first & 15) | (second << 4)
    out[..., 1::2] = (first >> 4) | (second & 0xF0)
