"""A coded matrix, or rows of it, as plain numbers."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

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
from headwater.devices.cuda.kernels.coded.parts import byte_codes, offset_bits, offset_of
from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.cuda.products.coded_matrix import LONG_CHUNK, CodedMatrix


def to_numbers(matrix: CodedMatrix, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix as plain numbers, or those rows of it: [out, in]."""
    if rows is None and dtype != torch.float32 and _is_simple_int4(matrix):
        return _int4_numbers(matrix, dtype)
    num_rows = matrix.shape[0] if rows is None else len(rows)
    out = torch.empty((num_rows, matrix.shape[1]), dtype=dtype, device=matrix.codes.device)
    if not num_rows:
        return out
    inner = matrix.words if matrix.format == "int4" else matrix.inner
    per_part = 8 if matrix.format == "int4" else 1
    chunks = max(1, 512 // inner)
    columns = triton.cdiv(matrix.shape[1], chunks * inner * per_part)
    _numbers_kernel[(num_rows, columns)](
        matrix.codes,
        matrix.scales,
        offset_bits(matrix),
        out if rows is None else rows,
        out,
        matrix.shape[1],
        *matrix.scales.stride(),
        GROUP=matrix.group,
        INNER=inner,
        BLOCK=matrix.block,
        CHUNKS=chunks,
        FORMAT=matrix.format,
        HAS_OFFSETS=matrix.offsets is not None,
        HAS_ROWS=rows is not None,
        num_warps=4,
    )
    return out


def _is_simple_int4(matrix: CodedMatrix) -> bool:
    is_int4 = matrix.format == "int4" and matrix.words == LONG_CHUNK
    return is_int4 and kind_of(matrix) != "offsets" and matrix.scales.dtype == torch.float16


def _int4_numbers(matrix: CodedMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The matrix as plain numbers of 16 bits: [out, in]"""
    num_features, width = matrix.shape
    out = torch.empty(matrix.shape, dtype=dtype, device=matrix.codes.device)
    features, chunks = 16, 4
    grid = (triton.cdiv(num_features, features), triton.cdiv(width, 8 * matrix.words * chunks))
    pointers = (matrix.codes.view(torch.int16), matrix.scales.view(torch.int16), out)
    sizes = (width, num_features, width // 4 * matrix.block, *matrix.scales.stride())
    flags = (matrix.group, 2 * matrix.words, matrix.block, features, chunks, kind_of(matrix), is_asm(dtype))
    key = (out.device.index, dtype, *sizes, *flags, *alignment(*pointers))
    _launch_int4_numbers(grid, *pointers, *sizes, *flags, key=key)
    return out


@triton.jit
def _numbers_kernel(
    codes,
    scales,
    offsets,
    rows,
    out,
    width,
    scale_row,
    scale_group,
    GROUP: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    to = out + row * width
    if HAS_ROWS:
        row = tl.load(rows + row).to(tl.int64)
    inner = tl.arange(0, INNER)
    if FORMAT == "int4":
        SPAN: tl.constexpr = 8 * INNER
        at = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
        is_word = (at < width // SPAN)[:, None]
        first = row // BLOCK * BLOCK * (width // 8) + row % BLOCK * INNER
        words = tl.load(codes + first + at[:, None] * (BLOCK * INNER) + inner[None, :], mask=is_word, other=0)
        run = tl.arange(0, 2 * INNER)
        is_run = (at < width // SPAN)[:, None]
        for i in tl.static_range(4):
            column = at[:, None] * SPAN + i * 2 * INNER + run[None, :]
            group = row * scale_row + column // GROUP * scale_group
            scale = tl.load(scales + group, mask=is_run, other=0.0).to(tl.float32)
            offset = offset_of(scale, offsets, group, is_run, FORMAT, HAS_OFFSETS)
            # of each word, the code of its lower half and that of its upper one
            pairs = tl.join((words >> (4 * i)) & 15, (words >> (4 * i + 16)) & 15)
            number = tl.reshape(pairs, (CHUNKS, 2 * INNER)).to(tl.float32) * scale + offset
            tl.store(to + column, number.to(out.dtype.element_ty), mask=is_run)
    else:
        column = tl.program_id(1) * CHUNKS * INNER + tl.arange(0, CHUNKS * INNER)
        is_column = column < width
        found = tl.load(codes + row * width + column, mask=is_column, other=0)
        group = row * scale_row + column // GROUP * scale_group
        scale = tl.load(scales + group, mask=is_column, other=0.0).to(tl.float32)
        number = byte_codes(found, FORMAT, tl.float32) * scale
        if HAS_OFFSETS:
            number += offset_of(scale, offsets, group, is_column, FORMAT, HAS_OFFSETS)
        tl.store(to + column, number.to(out.dtype.element_ty), mask=is_column)


@triton.jit
def _int4_numbers_kernel(
    codes, scales, out, width, num_features, line, scale_row, scale_group,
    GROUP: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, FEATURES: tl.constexpr, CHUNKS: tl.constexpr,
    KIND: tl.constexpr, IS_ASM: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    UNIT: tl.constexpr = 4 * RUN
    PARTS: tl.constexpr = UNIT // GROUP if GROUP < UNIT else 1
    RUNS: tl.constexpr = 4 // PARTS
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    is_feature = feature < num_features
    run = tl.arange(0, RUN)
    code_at = codes + (feature.to(tl.int64) // BLOCK * line + feature % BLOCK * RUN)[:, None] + run[None, :]
    scale_line = scales + feature * scale_row
    to = out + feature.to(tl.int64)[:, None] * width + run[None, :]
    for chunk in tl.static_range(CHUNKS):
        first = (tl.program_id(1) * CHUNKS + chunk) * UNIT
        is_in = is_feature & (tl.zeros((FEATURES,), tl.int32) + first < width)
        halves = tl.load(code_at + first // 4 * BLOCK, mask=is_in[:, None], other=0)
        for part in tl.static_range(PARTS):
            scale_at = (first + part * RUNS * RUN) // GROUP * scale_group
            if KIND == "middle":
                bits = tl.load(scale_line + scale_at, mask=is_in, other=0)
                minus = tl.full((FEATURES,), -8.0, tl.float32)
            else:
                pair = scale_line[:, None] + tl.arange(0, 2)[None, :] + scale_at
                bits, beside = tl.split(tl.load(pair, mask=is_in[:, None], other=0))
                minus = (beside.to(tl.int32) << 16).to(tl.float32, bitcast=True) + 128.0
            minus = tl.broadcast_to((minus - above(dtype, IS_ASM)).to(dtype)[:, None], (FEATURES, RUN))
            scale = scale_of(bits)
            for step in tl.static_range(RUNS):
                number = plus(low_codes(halves, dtype, IS_ASM), minus, dtype, IS_ASM)
                at = first + (part * RUNS + step) * RUN
                tl.store(to + at, times(number, scale, dtype, IS_ASM), mask=is_in[:, None])
                halves = next_codes(halves, IS_ASM)


_launch_int4_numbers = Launcher(_int4_numbers_kernel)
