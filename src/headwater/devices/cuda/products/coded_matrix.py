"""Matrices of 4-bit and 8-bit codes in a GPU's memory, in the layout of its kernels (kernels/coded/).

Codes of 4 bits lie in int32 words, in chunks of W words or 2 W halves of words: bits 4 i of half j of a chunk are input
2 i W + j of its 8 W inputs. So one code of each half is a run of 2 W inputs. Chunks of BLOCK outputs lie side by side,
so that the card reads 512 bytes at once. Scales lie side by side for all outputs of a group, each with its offset.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from headwater.devices.scaled_tensor import Codes, Floats, ScaledTensor, as_float16

LONG_CHUNK, SHORT_CHUNK = 16, 4  # words
BLOCK = 8  # outputs
_LONG_INPUTS, _SHORT_INPUTS = 8 * LONG_CHUNK, 8 * SHORT_CHUNK
_MOST_INNER, _LEAST_INNER = 64, 16  # inputs of 8-bit codes that are read together, of one group
_LARGEST_FLOAT8 = 448.0
_MOST_ZERO = 127  # so that -128 - zero point is exact in bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class CodedMatrix:
    """A matrix [out, in] of numbers code * scale + offset.

    `codes`: int4 int32[out / B, in / (8 W), B, W], where B is BLOCK, or 1 for sizes that are no multiples of it; int8
    int8[out, in]; float8_e4m3fn uint8[out, in], the bits. `scales` and `offsets`: [out, in / group] of float16 or
    float32; without offsets, 8 is taken from codes of 4 bits. Offsets of 4 bits that are zero points z are -128 - z in
    bfloat16 instead, so that numbers are (code + offset + 128) * scale. `words`: W, those of a chunk of 4 bits.
    """

    format: Codes
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    group: int
    words: int = 0

    @property
    def num_groups(self) -> int:
        return self.scales.shape[1]

    @property
    def inner(self) -> int:
        """Inputs of 8-bit codes that share a scale and are read together."""
        return _inner(self.group)

    @property
    def has_zeros(self) -> bool:
        """Whether its offsets are zero points."""
        return self.offsets is not None and self.offsets.dtype == torch.bfloat16

    @property
    def block(self) -> int:
        """Outputs whose chunks of codes lie side by side."""
        return self.codes.shape[2] if self.format == "int4" else 1

    def tensors(self) -> list[torch.Tensor]:
        return [self.codes, self.scales, *(() if self.offsets is None else (self.offsets,))]

    def rows(self, start: int, stop: int) -> "CodedMatrix":
        """Outputs [start, stop): views, unless they cut blocks."""
        if start % self.block or stop % self.block:
            codes = _in_blocks(_in_rows(self.codes)[start:stop], self.words)
        else:
            codes = self.codes[start // self.block : stop // self.block]
        offsets = None if self.offsets is None else self.offsets[start:stop]
        return replace(
            self,
            shape=(stop - start, self.shape[1]),
            codes=codes,
            scales=self.scales[start:stop],
            offsets=offsets,
        )

    def is_like(self, other: object) -> bool:
        """Whether both can be one matrix: the same inputs, in codes of one kind with as many scales."""
        if not isinstance(other, CodedMatrix):
            return False
        return self._kind() == other._kind()

    def _kind(self) -> tuple[object, ...]:
        dtypes = (self.scales.dtype, None if self.offsets is None else self.offsets.dtype)
        return (self.format, self.shape[1], self.group, self.words, self.block, *dtypes)


def join(matrices: Sequence[CodedMatrix]) -> CodedMatrix:
    """One below the other. They must be alike."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    some = [each.offsets for each in matrices if each.offsets is not None]
    scales, offsets = torch.cat([each.scales for each in matrices]), torch.cat(some) if some else None
    if first.format == "int4":
        scales, offsets = _beside(scales, offsets)
    return replace(
        first,
        shape=(sum(each.shape[0] for each in matrices), first.shape[1]),
        codes=torch.cat([each.codes for each in matrices]),
        scales=scales,
        offsets=offsets,
    )


def can_hold(tensor: ScaledTensor) -> bool:
    """Whether the kernels take codes and groups of these sizes."""
    if tensor.order is not None:
        return False
    width = tensor.shape[1]
    group = min(tensor.tile[1], width)
    return _words_of(width, group) > 0 if tensor.format == "int4" else _fits_bytes(width, group)


def place_codes(tensor: ScaledTensor, device: torch.device) -> CodedMatrix:
    """A tensor that `can_hold` accepts."""
    num_rows, width = tensor.shape
    high, group = tensor.tile[0], min(tensor.tile[1], width)

    def spread(numbers: npt.NDArray) -> torch.Tensor:
        return torch.from_numpy(np.repeat(numbers, high, axis=0)[:num_rows]).to(device)

    half = None if tensor.format == "float8_e4m3fn" else as_float16(tensor.scales)
    scales, offsets = spread(tensor.scales if half is None else half), None
    codes = torch.from_numpy(np.ascontiguousarray(tensor.codes)).to(device)
    if tensor.offsets is not None:
        zeros = _zero_points(tensor) if half is not None else None
        half_offset = as_float16(tensor.offsets) if half is not None else None
        if zeros is not None:
            offsets = (-128.0 - spread(zeros)).to(torch.bfloat16)
        elif half_offset is not None:
            offsets = spread(half_offset)
        else:
            scales, offsets = spread(tensor.scales), spread(tensor.offsets)
    words = 0
    if tensor.format == "int4":
        words = _words_of(width, group)
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).reshape(num_rows, width)
        codes = _in_blocks(to_words(codes, words), words)
        scales, offsets = _beside(scales, offsets)
    return CodedMatrix(tensor.format, tensor.shape, codes, scales, offsets, group, words)


def _zero_points(tensor: ScaledTensor) -> Floats | None:
    """The codes that stand for 0, if offsets are those times scales; of codes of 4 bits alone."""
    if tensor.format != "int4" or tensor.offsets is None:
        return None
    has_scale = tensor.scales != 0
    zeros = np.rint(-tensor.offsets / np.where(has_scale, tensor.scales, np.float32(1)))
    is_exact = (zeros * tensor.scales == -tensor.offsets).all()
    return zeros if is_exact and zeros.min() >= 0 and zeros.max() <= _MOST_ZERO else None


def _beside(scales: torch.Tensor, offsets: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales, and offsets if there are any, as views [out, groups] of memory [groups, out], or of pairs."""
    if offsets is None:
        return scales.t().contiguous().t(), None
    bits = torch.int32 if scales.dtype == torch.float32 else torch.int16
    pairs = torch.stack((scales.t().contiguous().view(bits), offsets.t().contiguous().view(bits)), dim=-1)
    return pairs[..., 0].view(scales.dtype).t(), pairs[..., 1].view(offsets.dtype).t()


def of_codes(
    form: Codes, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, *, group: int
) -> CodedMatrix:
    """Codes of 4 bits as uint8[out, in], or of 8 bits; scales in float32 are rounded to float16 where none is lost."""
    num_rows, width = codes.shape
    words = _words_of(width, group) if form == "int4" else 0
    assert words or form != "int4"
    halves = [scales.half(), *(() if offsets is None else (offsets.half(),))]
    is_exact = all(bool(torch.isfinite(each).all()) for each in halves) and bool((halves[0][scales != 0] != 0).all())
    if is_exact:
        scales, offsets = halves[0], None if offsets is None else halves[1]
    if form == "int4":
        codes = _in_blocks(to_words(codes, words), words)
        scales, offsets = _beside(scales, offsets)
    else:
        scales, offsets = scales.contiguous(), None if offsets is None else offsets.contiguous()
    return CodedMatrix(form, (num_rows, width), codes.contiguous(), scales, offsets, group, words)


def round_to_float8(weight: torch.Tensor) -> CodedMatrix:
    """Plain numbers as float8 with a scale for each output: its largest number becomes float8's largest."""
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    scales = torch.where(largest > 0, largest, _LARGEST_FLOAT8) / _LARGEST_FLOAT8
    codes = (weight.float() / scales).clamp(-_LARGEST_FLOAT8, _LARGEST_FLOAT8).to(torch.float8_e4m3fn)
    shape = (weight.shape[0], weight.shape[1])
    return CodedMatrix("float8_e4m3fn", shape, codes.view(torch.uint8), scales, None, group=shape[1])


def can_round(shape: Sequence[int]) -> bool:
    """Whether `round_to_float8` makes a matrix that the kernels take."""
    return len(shape) == 2 and _fits_bytes(shape[1], shape[1])


def codes_to_host(matrix: CodedMatrix) -> ScaledTensor:
    """The same codes, scales and offsets in host memory: placed again, they give the same matrix."""
    codes = matrix.codes
    if matrix.format == "int4":
        numbers = of_words(_in_rows(codes), matrix.words)
        codes = numbers[:, 0::2] | numbers[:, 1::2] << 4
    scales, offsets = matrix.scales.float(), None if matrix.offsets is None else matrix.offsets.float()
    if offsets is not None and matrix.has_zeros:
        offsets = (offsets + 128) * scales
    scales, offsets = (None if each is None else each.contiguous().cpu().numpy() for each in (scales, offsets))
    assert scales is not None
    host = codes.contiguous().cpu().numpy()
    return ScaledTensor(matrix.format, matrix.shape, host, scales, tile=(1, matrix.group), offsets=offsets)


def to_words(codes: torch.Tensor, words: int) -> torch.Tensor:
    """Codes of 4 bits, uint8[out, in], to int32[out, in / 8]."""
    num_rows, width = codes.shape
    pairs = codes.reshape(num_rows, width // (8 * words), 2, 2, 2 * words)
    packed = pairs[:, :, :, 0] | pairs[:, :, :, 1] << 4  # byte of a half, half
    return packed.transpose(2, 3).reshape(num_rows, width // 2).contiguous().view(torch.int32)


def of_words(packed: torch.Tensor, words: int) -> torch.Tensor:
    """The inverse of `to_words`."""
    num_rows, num_words = packed.shape
    halves = packed.contiguous().view(torch.uint8).reshape(num_rows, num_words // words, 2 * words, 2).transpose(2, 3)
    return torch.stack((halves & 15, halves >> 4), dim=3).reshape(num_rows, num_words * 8)


def _in_blocks(packed: torch.Tensor, words: int) -> torch.Tensor:
    """int32[out, in / 8] to blocks, whose chunks lie side by side."""
    num_rows = len(packed)
    block = BLOCK if num_rows % BLOCK == 0 else 1
    return packed.reshape(num_rows // block, block, -1, words).transpose(1, 2).contiguous()


def _in_rows(blocks: torch.Tensor) -> torch.Tensor:
    """The inverse of `_in_blocks`."""
    return blocks.transpose(1, 2).reshape(blocks.shape[0] * blocks.shape[2], -1)


def _words_of(width: int, group: int) -> int:
    """Words of a chunk: each is of whole groups, or lies within one; runs do as well. 0 if there is no such chunk."""
    is_whole = group >= width
    if width % _LONG_INPUTS == 0 and (is_whole or group % _LONG_INPUTS == 0 or group in (32, 64)):
        return LONG_CHUNK
    if width % _SHORT_INPUTS == 0 and (is_whole or group % _SHORT_INPUTS == 0):
        return SHORT_CHUNK
    return 0


def _inner(group: int) -> int:
    return min(_MOST_INNER, group & -group)


def _fits_bytes(width: int, group: int) -> bool:
    return width % _LEAST_INNER == 0 and _inner(group) >= _LEAST_INNER
