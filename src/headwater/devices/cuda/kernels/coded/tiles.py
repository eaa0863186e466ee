"""Some tokens times a matrix of 8-bit codes: codes become floats on the way to the tensor cores.

The matrix is the first factor, so that a few tokens fill a tile. Where a layer has too few outputs for the card, its
inputs are split between programs, and a second kernel adds their sums in order. Offsets are a small product of their
own, with the sums of each group's inputs. Float8 codes are multiplied with float8 tokens (products/scaled_product.py):
the card's units take both as they are. int4_tiles.py is for codes of 4 bits.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.coded.parts import byte_codes
from headwater.devices.cuda.kernels.coded.sums import add_sums, group_sums
from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.cuda.kernels.rows import Parts
from headwater.devices.cuda.products.coded_matrix import CodedMatrix

_MAX_TOKENS = 128  # above, plain numbers in a library's product are the faster way
_WANTED_PROGRAMS = 198  # three for two of an H200's processors
_MAX_SPLITS = 8
_MIN_SPLIT = 256  # inputs of a split, at least
_GROUPS_AT_ONCE = tl.constexpr(32)


@dataclass(frozen=True, slots=True)
class TileShape:
    """How a product is cut: tokens and outputs of a program, and inputs at a time."""

    tokens: int
    features: int
    columns: int
    num_warps: int
    num_stages: int


# by the number of tokens up to which a shape suits; the fastest of those tried on an H200
_BYTE_SHAPES = (
    (16, TileShape(16, 64, 128, 4, 4)),
    (64, TileShape(64, 64, 128, 4, 4)),
    (1 << 30, TileShape(128, 128, 128, 8, 3)),
)
_FLOAT8_SHAPES = (
    (16, TileShape(16, 64, 256, 4, 3)),
    (64, TileShape(64, 128, 256, 4, 3)),
    (1 << 30, TileShape(128, 128, 128, 4, 3)),
)
_FLOAT8_GROUP_SHAPES = (  # sums of a group beside those of all take registers
    (16, TileShape(16, 64, 128, 4, 4)),
    (64, TileShape(64, 64, 128, 4, 4)),
    (1 << 30, TileShape(128, 128, 128, 8, 3)),
)
_FLOAT32 = TileShape(16, 64, 64, 4, 2)  # for tests


def suits_tiles(num_tokens: int, matrix: CodedMatrix) -> bool:
    """Whether `tiles` is the faster way for some tokens."""
    return num_tokens <= _MAX_TOKENS and matrix.format != "int4"


def tiles(
    x: torch.Tensor,
    matrix: CodedMatrix,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    adds: bool,
    token_scales: torch.Tensor | None = None,
) -> None:
    """y = x W^T + b, or y += x W^T + b. [T, in] -> [T, out], whose rows may be parts of longer ones.

    With `token_scales`, float32[T, 1] or [T, in / group], x is of float8 as the matrix is.
    """
    if _num_splits(x, matrix) > 1:
        add_sums(Parts(tile_parts(x, matrix, token_scales=token_scales), bias), y, adds=adds)
    else:
        _launch(x, matrix, bias, y, adds=adds, token_scales=token_scales)


def tile_parts(x: torch.Tensor, matrix: CodedMatrix, *, token_scales: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T as a sum over splits of the inputs, float32[splits, T, out]. `x` and `token_scales` as above."""
    shape = (_num_splits(x, matrix), len(x), matrix.shape[0])
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    _launch(x, matrix, None, out, adds=False, token_scales=token_scales)
    return out


def _launch(
    x: torch.Tensor,
    matrix: CodedMatrix,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    adds: bool,
    token_scales: torch.Tensor | None,
) -> None:
    num_tokens, (num_features, width) = len(x), matrix.shape
    shape, run, unit, per_split = _cut(x, matrix)
    num_splits = triton.cdiv(width, per_split)
    grid = (triton.cdiv(num_features, shape.features), triton.cdiv(num_tokens, shape.tokens))
    has_offsets, is_whole = matrix.offsets is not None, matrix.num_groups == 1
    offsets, sums = matrix.scales, matrix.scales
    if matrix.offsets is not None:
        offsets, sums = matrix.offsets, group_sums(x, matrix.group)
    sizes = (width, num_features, matrix.num_groups, out.stride(-2), per_split)
    flags = (
        matrix.group, run, unit, shape.tokens, shape.features, matrix.format, has_offsets, is_whole,
        width % unit == 0, token_scales is not None, token_scales is not None and token_scales.shape[1] > 1,
        bias is not None, adds,
    )  # fmt: skip
    pointers = (x, matrix.codes, matrix.scales, offsets, sums)
    pointers = (*pointers, *(matrix.scales if each is None else each for each in (token_scales, bias)), out)
    dtypes = tuple(each.dtype for each in pointers)
    key = (x.device.index, dtypes, *sizes, *flags, shape.num_warps, shape.num_stages, *alignment(*pointers))
    pointers = (_bits(pointers[0]), *pointers[1:])
    _launch_tiles(
        (*grid, num_splits), *pointers, num_tokens, *sizes, *flags,
        key=key, num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip


def _cut(x: torch.Tensor, matrix: CodedMatrix) -> tuple[TileShape, int, int, int]:
    """The tiles' shape; inputs of a product in tiles, of a turn of the kernel's loop, and of a split."""
    num_features, width = matrix.shape
    shape = _shape_for(len(x), x.dtype, matrix)
    run, unit = _inputs_at_once(matrix, shape)
    num_programs = triton.cdiv(num_features, shape.features) * triton.cdiv(len(x), shape.tokens)
    return shape, run, unit, _inputs_of_a_split(width, unit, num_programs)


def _num_splits(x: torch.Tensor, matrix: CodedMatrix) -> int:
    return triton.cdiv(matrix.shape[1], _cut(x, matrix)[-1])


def _shape_for(num_tokens: int, dtype: torch.dtype, matrix: CodedMatrix) -> TileShape:
    if dtype == torch.float32:
        return _FLOAT32
    shapes = _BYTE_SHAPES
    if dtype == torch.float8_e4m3fn:
        shapes = _FLOAT8_SHAPES if matrix.num_groups == 1 else _FLOAT8_GROUP_SHAPES
    return next(shape for most, shape in shapes if num_tokens <= most)


def _inputs_at_once(matrix: CodedMatrix, shape: TileShape) -> tuple[int, int]:
    """Inputs of a product in tiles, which share a scale, and of a turn of the kernel's loop."""
    if matrix.num_groups == 1:
        return shape.columns, shape.columns
    run = min(shape.columns, matrix.group & -matrix.group)
    return run, max(run, shape.columns)


def _inputs_of_a_split(width: int, unit: int, num_programs: int) -> int:
    """A multiple of `unit` that makes programs enough for the card."""
    splits = 1
    while splits < _MAX_SPLITS and splits * num_programs < _WANTED_PROGRAMS and width >= 2 * splits * _MIN_SPLIT:
        splits *= 2
    return triton.cdiv(triton.cdiv(width, unit), splits) * unit


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


@triton.jit(do_not_specialize=["num_tokens"])
def _tiles_kernel(
    x,
    codes,
    scales,
    offsets,
    group_sums,
    token_scales,
    biases,
    out,
    num_tokens,
    width,
    num_features,
    num_groups,
    out_stride,
    per_split,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
    HAS_TOKEN_GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    start = tl.program_id(2) * per_split
    stop = tl.minimum(start + per_split, width)
    is_in, is_token = feature < num_features, token < num_tokens
    run = tl.arange(0, RUN)
    x_at = x + token.to(tl.int64)[None, :] * width + run[:, None]
    line = feature.to(tl.int64) * num_groups
    sums = tl.zeros((FEATURES, TOKENS), tl.float32)
    code_at = codes + feature.to(tl.int64)[:, None] * width + run[None, :]
    for first in range(start, stop, UNIT):
        for part in tl.static_range(UNIT // RUN):
            at = first + part * RUN
            is_code, is_value = is_in[:, None], is_token[None, :]
            if not IS_EVEN:
                is_column = at + run < width
                is_code, is_value = is_code & is_column[None, :], is_value & is_column[:, None]
            found = tl.load(code_at + at, mask=is_code, other=0)
            if IS_FLOAT8:
                value = tl.load(x_at + at, mask=is_value, other=0).to(tl.float8e4nv, bitcast=True)
                number = found.to(tl.float8e4nv, bitcast=True)
            else:
                value = tl.load(x_at + at, mask=is_value, other=0.0)
                number = byte_codes(found, FORMAT, value.dtype)
            if IS_WHOLE:
                sums = tl.dot(number, value, sums, input_precision="ieee")
            else:
                place = at // GROUP if IS_EVEN else tl.minimum(at, width - 1) // GROUP
                products = tl.dot(number, value, input_precision="ieee")
                if HAS_TOKEN_GROUPS:
                    scale_at = token_scales + token * num_groups + place
                    products *= tl.load(scale_at, mask=is_token, other=0.0)[None, :]
                sums += products * tl.load(scales + line + place, mask=is_in, other=0.0).to(tl.float32)[:, None]
    if IS_WHOLE:
        sums *= tl.load(scales + line, mask=is_in, other=0.0).to(tl.float32)[:, None]
    if IS_FLOAT8 and not HAS_TOKEN_GROUPS:
        sums *= tl.load(token_scales + token, mask=is_token, other=0.0)[None, :]
    if HAS_OFFSETS:
        # groups that begin in this split
        group = tl.arange(0, _GROUPS_AT_ONCE)
        stop_group = (stop + GROUP - 1) // GROUP
        for first in range((start + GROUP - 1) // GROUP, stop_group, _GROUPS_AT_ONCE):
            is_group = first + group < stop_group
            number_at, is_number = line[:, None] + first + group[None, :], is_in[:, None] & is_group[None, :]
            offset = tl.load(offsets + number_at, mask=is_number, other=0.0).to(tl.float32)
            total_at = group_sums + token[None, :] * num_groups + first + group[:, None]
            total = tl.load(total_at, mask=is_token[None, :] & is_group[:, None], other=0.0)
            sums = tl.dot(offset, total, sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(biases + feature, mask=is_in, other=0.0).to(tl.float32)[:, None]
    row = tl.program_id(2).to(tl.int64) * num_tokens + token
    out_at = out + row[None, :] * out_stride + feature[:, None]
    is_out = is_in[:, None] & is_token[None, :]
    if ADDS:
        sums += tl.load(out_at, mask=is_out, other=0.0).to(tl.float32)
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=is_out)


_launch_tiles = Launcher(_tiles_kernel)
