"""Some tokens, or one, times a matrix of 4-bit codes: codes become floats on the way to the tensor cores.

The matrix is the first factor, so that a few tokens fill a tile. One shift and one logical operation make two bfloat16
numbers of 128 + n of two codes, or float16 of 1024 + n (Kim et al., arXiv 2211.10017). One addition takes that and the
zero point away. All of these are exact. A group's scale multiplies its sum.

With many tokens the scale multiplies the numbers, which are rounded once, as where a matrix becomes plain. A sum of all
groups then takes half the registers. Where a layer has too few outputs for the card, its inputs are split between
programs, and what comes next adds the parts. Offsets that are no zero points are a small product of their own, with
the sums of a group's inputs.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.coded.int4 import (
    above,
    is_asm,
    kind_of,
    low_codes,
    next_codes,
    plus,
    scale_of,
    times,
)
from headwater.devices.cuda.kernels.coded.sums import add_sums, group_sums
from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.cuda.kernels.rows import Parts
from headwater.devices.cuda.products.coded_matrix import CodedMatrix

_MAX_TOKENS = 512  # above, plain numbers in a library's product are the faster way
_MIN_RUN = 16  # inputs of a product in tiles, at least
_FEW_TOKENS, _MAX_SPLITS, _MAX_SPLITS_OF_MANY = 32, 8, 4  # parts of many tokens take long to add up
_MIN_SPLIT = 256  # inputs of a split, at least
_LARGE = 1 << 25  # numbers
_GROUPS_AT_ONCE = tl.constexpr(32)


@dataclass(frozen=True, slots=True)
class TileShape:
    """How a product is cut: tokens and outputs of a program, and the programs that the card wants."""

    tokens: int
    features: int
    num_warps: int
    num_stages: int
    num_programs: int
    rounds: bool = False  # numbers times their scale, instead of sums


# by the number of tokens up to which a shape suits; the fastest of those tried on an H200
_SHAPES = (
    (8, TileShape(8, 64, 2, 3, 896)),
    (16, TileShape(16, 128, 4, 3, 448)),
    (32, TileShape(32, 128, 4, 3, 224)),
    (64, TileShape(64, 128, 4, 3, 160)),
    (1 << 30, TileShape(128, 128, 8, 3, 200, rounds=True)),
)
_FLOAT32 = TileShape(16, 64, 4, 2, 198)  # for tests


def suits_int4_tiles(x: torch.Tensor, matrix: CodedMatrix) -> bool:
    """Whether `int4_tiles` is the fastest way for some tokens: not for matrices in short chunks.

    Offsets that are no zero points need sums of inputs, which take longer than one token times a small matrix.
    """
    if matrix.format != "int4" or 2 * matrix.words < _MIN_RUN or len(x) > _MAX_TOKENS:
        return False
    if len(x) > 1:
        return True
    is_simple = matrix.offsets is None or matrix.has_zeros
    return x.dtype != torch.float32 and (is_simple or matrix.shape[0] * matrix.shape[1] >= _LARGE)


def splits_int4(x: torch.Tensor, matrix: CodedMatrix) -> bool:
    """Whether the product is best computed as the sum of several, of parts of the inputs."""
    return suits_int4_tiles(x, matrix) and _cut(x, matrix)[1] < matrix.shape[1]


def int4_tiles(x: torch.Tensor, matrix: CodedMatrix, bias: torch.Tensor | None, y: torch.Tensor, *, adds: bool) -> None:
    """y = x W^T + b, or y += x W^T + b. [T, in] -> [T, out], whose rows may be parts of longer ones."""
    shape, per_split = _cut(x, matrix)
    if per_split < matrix.shape[1]:
        add_sums(Parts(int4_parts(x, matrix), bias), y, adds=adds)
    else:
        _launch(x, matrix, bias, y, adds=adds, shape=shape, per_split=per_split)


def int4_parts(x: torch.Tensor, matrix: CodedMatrix) -> torch.Tensor:
    """x W^T as a sum over splits of the inputs, float32[splits, T, out]."""
    shape, per_split = _cut(x, matrix)
    num_splits = triton.cdiv(matrix.shape[1], per_split)
    out = torch.empty((num_splits, len(x), matrix.shape[0]), dtype=torch.float32, device=x.device)
    _launch(x, matrix, None, out, adds=False, shape=shape, per_split=per_split)
    return out


def _cut(x: torch.Tensor, matrix: CodedMatrix) -> tuple[TileShape, int]:
    """The tiles' shape, and the inputs of a split: whole chunks, and as many splits as make programs enough."""
    num_tokens, (num_features, width) = len(x), matrix.shape
    shape = _FLOAT32 if x.dtype == torch.float32 else next(shape for most, shape in _SHAPES if num_tokens <= most)
    num_tiles = triton.cdiv(num_features, shape.features) * triton.cdiv(num_tokens, shape.tokens)
    most = _MAX_SPLITS if num_tokens <= _FEW_TOKENS else _MAX_SPLITS_OF_MANY
    splits = 1
    while splits < most and splits * num_tiles < shape.num_programs and width >= 2 * splits * _MIN_SPLIT:
        splits *= 2
    unit = 8 * matrix.words
    return shape, triton.cdiv(triton.cdiv(width, unit), splits) * unit


def _launch(
    x: torch.Tensor,
    matrix: CodedMatrix,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    adds: bool,
    shape: TileShape,
    per_split: int,
) -> None:
    num_tokens, (num_features, width), kind = len(x), matrix.shape, kind_of(matrix)
    grid = (
        triton.cdiv(num_tokens, shape.tokens),
        triton.cdiv(num_features, shape.features),
        triton.cdiv(width, per_split),
    )
    sums = group_sums(x, matrix.group) if kind == "offsets" else matrix.scales
    bits = torch.int32 if matrix.scales.dtype == torch.float32 else torch.int16
    pointers = (
        x,
        matrix.codes.view(torch.int16),
        matrix.scales.view(bits),
        sums,
        matrix.scales if bias is None else bias,
        out,
    )
    line = width // 4 * matrix.block
    sizes = (width, num_features, line, *matrix.scales.stride(), matrix.num_groups, out.stride(-2), per_split)
    rounds = shape.rounds and matrix.scales.dtype == torch.float16
    flags = (
        matrix.group, 2 * matrix.words, matrix.block, shape.tokens, shape.features, kind, is_asm(x.dtype), rounds,
        bias is not None, adds,
    )  # fmt: skip
    dtypes = tuple(each.dtype for each in pointers)
    key = (x.device.index, dtypes, *sizes, *flags, shape.num_warps, shape.num_stages, *alignment(*pointers))
    _launch_int4(
        grid, *pointers, num_tokens, *sizes, *flags, key=key, num_warps=shape.num_warps, num_stages=shape.num_stages
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _int4_kernel(
    x, codes, scales, group_sums, biases, out,
    num_tokens, width, num_features, line, scale_row, scale_group, num_groups, out_stride, per_split,
    GROUP: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
    KIND: tl.constexpr, IS_ASM: tl.constexpr, ROUNDS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    UNIT: tl.constexpr = 4 * RUN
    PARTS: tl.constexpr = UNIT // GROUP if GROUP < UNIT else 1  # groups of a chunk
    RUNS: tl.constexpr = 4 // PARTS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    start = tl.program_id(2) * per_split
    stop = tl.minimum(start + per_split, width)
    is_in, is_token = feature < num_features, token < num_tokens
    run = tl.arange(0, RUN)
    x_at = x + token.to(tl.int64)[None, :] * width + run[:, None]
    code_at = codes + (feature.to(tl.int64) // BLOCK * line + feature % BLOCK * RUN)[:, None] + run[None, :]
    scale_line = scales + feature * scale_row
    if KIND == "middle":
        scale_place, is_scale = feature * scale_row, is_in
    else:  # a scale and what is beside it
        scale_place, is_scale = (feature * scale_row)[:, None] + tl.arange(0, 2)[None, :], is_in[:, None]
    if PARTS >= 2:  # of all groups of a chunk: a join puts two side by side, and a split takes them apart again
        scale_feature = feature if KIND == "middle" else tl.join(feature, feature)
        if PARTS == 4:
            scale_place = tl.join(scale_place, scale_place + 2 * scale_group)
            scale_feature = tl.join(scale_feature, scale_feature)
        scale_place = tl.join(scale_place, scale_place + scale_group)
        is_scale = tl.join(scale_feature, scale_feature) < num_features
    sums = tl.zeros((FEATURES, TOKENS), tl.float32)
    next_scales = tl.load(scales + start // GROUP * scale_group + scale_place, mask=is_scale, other=0)
    for first in range(start, stop, UNIT):
        halves = tl.load(code_at + first // 4 * BLOCK, mask=is_in[:, None], other=0)
        all_bits = _parts(next_scales, PARTS)
        next_group = tl.minimum(first + UNIT, stop - 1) // UNIT * UNIT // GROUP
        next_scales = tl.load(scales + next_group * scale_group + scale_place, mask=is_scale, other=0)
        for part in tl.static_range(PARTS):
            bits = all_bits[part]
            minus = tl.full((FEATURES,), -8.0, tl.float32)
            if KIND != "middle":
                bits, beside = tl.split(bits)
                if KIND == "zeros":  # the upper half of a float32: -128 - zero point
                    minus = (beside.to(tl.int32) << 16).to(tl.float32, bitcast=True) + 128.0
            minus = (minus - above(dtype, IS_ASM)).to(dtype)
            minus = tl.broadcast_to(minus[:, None], (FEATURES, RUN))
            scale = scale_of(bits)
            if not ROUNDS:
                products = tl.zeros((FEATURES, TOKENS), tl.float32)
            for step in tl.static_range(RUNS):
                value = tl.load(x_at + first + (part * RUNS + step) * RUN, mask=is_token[None, :], other=0.0)
                number = plus(low_codes(halves, dtype, IS_ASM), minus, dtype, IS_ASM)
                if ROUNDS:
                    sums = tl.dot(times(number, scale, dtype, IS_ASM), value, sums)
                else:
                    products = tl.dot(number, value, products, input_precision="ieee")
                halves = next_codes(halves, IS_ASM)
            if not ROUNDS:
                sums += products * scale[:, None]
            elif IS_ASM:
                # The compiler waits here for the products of one turn. Else it leaves the last one to the next turn,
                # and then waits for each instruction.
                sums = tl.inline_asm_elementwise("// used", "=f,0", [sums], dtype=tl.float32, is_pure=True, pack=1)
    if KIND == "offsets":
        # groups that begin in this split; codes were taken as numbers from -8 on
        group = tl.arange(0, _GROUPS_AT_ONCE)
        stop_group = (stop + GROUP - 1) // GROUP
        for first in range((start + GROUP - 1) // GROUP, stop_group, _GROUPS_AT_ONCE):
            is_group = first + group < stop_group
            at = scale_line[:, None] + (first + group)[None, :] * scale_group
            is_number = is_in[:, None] & is_group[None, :]
            offset = scale_of(tl.load(at + 1, mask=is_number, other=0))
            offset += 8.0 * scale_of(tl.load(at, mask=is_number, other=0))
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


@triton.jit
def _parts(bits, PARTS: tl.constexpr):
    """What lies side by side, apart: for each group of a chunk."""
    if PARTS == 1:
        found = (bits,)
    elif PARTS == 2:
        found = tl.split(bits)
    else:
        even, odd = tl.split(bits)
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        found = (first, second, third, fourth)
    return found


_launch_int4 = Launcher(_int4_kernel)
