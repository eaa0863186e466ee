"""One token times a large matrix, by programs that stay: each streams rows of W through shared memory.

A program for a few rows each, as in skinny.py, asks for its first rows only when it starts, so that the memory waits
between programs. Here two programs of each multiprocessor go through all rows, with several of them on their way at any
time, and keep the token in registers. The norm before the product, the residual's addition and the MLP's gate are part
of it.
Measured on an H200: up to an eighth faster for large matrices, slower for small ones.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import functools

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.coded.parts import byte_codes
from headwater.devices.cuda.kernels.layers import activated, normed_input
from headwater.devices.cuda.kernels.rows import PlainRows, UnnormedRows, norm_arguments

_MIN_BYTES, _MIN_CODE_BYTES = 32 << 20, 96 << 20  # codes take longer to become floats than to read
_MOST_INPUTS = 1 << 14  # a token's, which lie in registers
_MOST_ROW_BYTES = 32 << 10  # of a row, or of the two rows of a gate
_STAGE_BYTES = 16 << 10  # on their way together
_LARGE_ROW_BYTES = 8 << 10  # from which twice the warps are faster
_PROGRAMS_OF_A_PROCESSOR = 2
_INTERPRETED_PROGRAMS = 3  # few, so that tests see each of them go through several rows


def suits_stream(weight: torch.Tensor, *, is_gated: bool) -> bool:
    """Whether one token times the matrix [out, in] goes this way."""
    width = triton.next_power_of_2(weight.shape[1])
    if width > _MOST_INPUTS or _row_bytes(weight, is_gated=is_gated) > _MOST_ROW_BYTES:
        return False
    size = weight.element_size()
    return weight.numel() * size >= (_MIN_CODE_BYTES if size == 1 else _MIN_BYTES)


def stream(
    x: PlainRows,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    adds: bool,
    is_gated: bool = False,
    is_gelu: bool = False,
) -> None:
    """y = x W^T + b, or y += x W^T + b. [1, in], [out, in], [out] -> [1, out]

    With `scales`, one of each output, `weight` is the bits of float8_e4m3fn. `is_gated`: activation(x Wg^T + bg) *
    (x Wu^T + bu) of W [Wg, Wu], one below the other.
    """
    assert len(x) == 1
    num_rows, width = weight.shape
    num_features = num_rows // 2 if is_gated else num_rows
    row_bytes = _row_bytes(weight, is_gated=is_gated)
    num_together = max(1, _STAGE_BYTES // row_bytes)
    num_programs = min(_num_programs(weight.device), triton.cdiv(num_features, num_together))
    rows, norm, eps, offset = norm_arguments(x)
    _stream_kernel[(num_programs,)](
        rows,
        norm,
        weight,
        norm if scales is None else scales,
        norm if bias is None else bias,
        y,
        num_features,
        eps,
        offset,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        ROWS=num_together,
        STAGES=4 if row_bytes <= _STAGE_BYTES else 3,
        HAS_NORM=isinstance(x, UnnormedRows),
        HAS_SCALES=scales is not None,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        IS_GATED=is_gated,
        IS_GELU=is_gelu,
        num_warps=4 if row_bytes <= _LARGE_ROW_BYTES else 8,
    )


def _row_bytes(weight: torch.Tensor, *, is_gated: bool) -> int:
    return triton.next_power_of_2(weight.shape[1]) * weight.element_size() * (2 if is_gated else 1)


@functools.cache
def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return _PROGRAMS_OF_A_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _outputs(
    found, value, scale, scales, biases, row, is_row, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Of some rows of W and the token."""
    if HAS_SCALES:
        weights = byte_codes(found, "float8_e4m3fn", tl.float32)
    else:
        weights = found.to(tl.float32)
    total = tl.sum(weights * value[None, :], 1) * scale
    if HAS_SCALES:
        total *= tl.load(scales + row, mask=is_row, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(biases + row, mask=is_row, other=0.0).to(tl.float32)
    return total


@triton.jit
def _stream_kernel(
    x, norm, weight, scales, biases, y, num_features, eps, offset,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, IS_GATED: tl.constexpr,
    IS_GELU: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    is_column = column < WIDTH
    value, square = normed_input(x, norm, column, is_column, offset, HAS_NORM)
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(square, 0) / WIDTH + eps)
    # the number of stages makes the compiler read rows ahead: without it, only operands of tensor cores are
    for group in tl.range(tl.program_id(0), tl.cdiv(num_features, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = group * ROWS + tl.arange(0, ROWS)
        is_row = row < num_features
        at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        is_in = is_row[:, None] & is_column[None, :]
        # read once and never again: what other kernels need stays in the cache
        found = tl.load(weight + at, mask=is_in, other=0, eviction_policy="evict_first")
        if IS_GATED:
            ups_at = weight + num_features.to(tl.int64) * WIDTH + at
            ups = tl.load(ups_at, mask=is_in, other=0, eviction_policy="evict_first")
        total = _outputs(found, value, scale, scales, biases, row, is_row, HAS_SCALES, HAS_BIAS)
        if IS_GATED:
            up = _outputs(
                ups, value, scale, scales, biases, num_features + row, is_row, HAS_SCALES, HAS_BIAS
            )
            total = activated(total, IS_GELU) * up
        if ADDS:
            total += tl.load(y + row, mask=is_row, other=0.0).to(tl.float32)
        tl.store(y + row, total.to(y.dtype.element_ty), mask=is_row)
