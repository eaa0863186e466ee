"""A coded matrix, or rows of it, as plain numbers."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.coded.parts import byte_codes, offset_of
from headwater.devices.cuda.products.coded_matrix import CodedMatrix


def to_numbers(matrix: CodedMatrix, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix as plain numbers, or those rows of it: [out, in]."""
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
        matrix.scales if matrix.offsets is None else matrix.offsets,
        out if rows is None else rows,
        out,
        matrix.shape[1],
        matrix.num_groups,
        GROUP=matrix.group,
        INNER=inner,
        CHUNKS=chunks,
        FORMAT=matrix.format,
        HAS_OFFSETS=matrix.offsets is not None,
        HAS_ROWS=rows is not None,
        num_warps=4,
    )
    return out


@triton.jit
def _numbers_kernel(
    codes,
    scales,
    offsets,
    rows,
    out,
    width,
    num_groups,
    GROUP: tl.constexpr,
    INNER: tl.constexpr,
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
        words = tl.load(codes + row * (width // 8) + at[:, None] * INNER + inner[None, :], mask=is_word, other=0)
        run = tl.arange(0, 2 * INNER)
        is_run = (at < width // SPAN)[:, None]
        for i in tl.static_range(4):
            column = at[:, None] * SPAN + i * 2 * INNER + run[None, :]
            group = row * num_groups + column // GROUP
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
        group = row * num_groups + column // GROUP
        scale = tl.load(scales + group, mask=is_column, other=0.0).to(tl.float32)
        number = byte_codes(found, FORMAT, tl.float32) * scale
        if HAS_OFFSETS:
            number += offset_of(scale, offsets, group, is_column, FORMAT, HAS_OFFSETS)
        tl.store(to + column, number.to(out.dtype.element_ty), mask=is_column)
