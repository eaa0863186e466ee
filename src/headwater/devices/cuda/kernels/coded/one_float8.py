"""One token times float8 with a scale for each output: the norm before it and the gate of an MLP are part of it.

A program computes four outputs, whose codes share the inputs in registers.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.coded.parts import byte_codes, put, with_bias
from headwater.devices.cuda.kernels.few_rows.stream import stream, suits_stream
from headwater.devices.cuda.kernels.layers import activated, normed_input
from headwater.devices.cuda.kernels.rows import PlainRows, UnnormedRows, norm_arguments
from headwater.devices.cuda.products.coded_matrix import CodedMatrix
from headwater.devices.device import Activation

_OUTPUTS = 4  # of a program; the kernel spells them out
# inputs at a time, and warps: the fastest of those tried on an H200, with a norm and without
_OF_NORMED, _OF_PLAIN = (512, 2), (1024, 4)


def suits_one_float8(matrix: CodedMatrix) -> bool:
    """Whether one token times the matrix goes this way."""
    return matrix.format == "float8_e4m3fn" and matrix.num_groups == 1 and matrix.offsets is None


def one_float8(x: PlainRows, matrix: CodedMatrix, bias: torch.Tensor | None, y: torch.Tensor, *, adds: bool) -> None:
    """y = x W^T + b, or y += x W^T + b. [1, in] -> [1, out]"""
    _launch(x, matrix, bias, y, adds=adds)


def gated_float8(x: PlainRows, matrix: CodedMatrix, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """activation(x Wg^T + bg) * (x Wu^T + bu) of W [Wg, Wu], one below the other. [1, in] -> [1, out]"""
    y = torch.empty((1, matrix.shape[0] // 2), dtype=x.dtype, device=x.device)
    _launch(x, matrix, bias, y, is_gated=True, is_gelu=activation == "gelu_tanh")
    return y


def _launch(
    x: PlainRows,
    matrix: CodedMatrix,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    adds: bool = False,
    is_gated: bool = False,
    is_gelu: bool = False,
) -> None:
    if suits_stream(matrix.codes, is_gated=is_gated):
        return stream(x, matrix.codes, matrix.scales, bias, y, adds=adds, is_gated=is_gated, is_gelu=is_gelu)
    num_features, width = matrix.shape
    num_features, outputs = (num_features // 2, _OUTPUTS // 2) if is_gated else (num_features, _OUTPUTS)
    rows, norm, eps, offset = norm_arguments(x)
    has_norm = isinstance(x, UnnormedRows)
    lanes, num_warps = _OF_NORMED if has_norm else _OF_PLAIN
    _one_float8_kernel[(triton.cdiv(num_features, outputs),)](
        rows,
        norm,
        matrix.codes,
        matrix.scales,
        matrix.scales if bias is None else bias,
        y,
        width,
        num_features,
        eps,
        offset,
        LANES=min(lanes, triton.next_power_of_2(width)),
        HAS_NORM=has_norm,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        IS_GATED=is_gated,
        IS_GELU=is_gelu,
        num_warps=num_warps,
    )


@triton.jit
def _codes(codes, row, lane, is_in, width):
    # read once and never again: what other kernels need stays in the cache
    found = tl.load(codes + row * width + lane, mask=is_in, other=0, eviction_policy="evict_first")
    return byte_codes(found, "float8_e4m3fn", tl.float32)


@triton.jit
def _total(sums, scale, row, scales, biases, HAS_BIAS: tl.constexpr):
    """One output from the sums of its lanes."""
    return with_bias(tl.sum(sums, 0) * scale * tl.load(scales + row).to(tl.float32), row, biases, HAS_BIAS)


@triton.jit
def _one_float8_kernel(
    x,
    norm,
    codes,
    scales,
    biases,
    y,
    width,
    num_features,
    eps,
    offset,
    LANES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_GELU: tl.constexpr,
):
    # those behind the last output repeat it; with a gate, the third and fourth are the ups of the first two
    OUTPUTS: tl.constexpr = 2 if IS_GATED else 4
    first_row = tl.program_id(0) * OUTPUTS
    last = num_features - 1
    row0, row1 = first_row.to(tl.int64), tl.minimum(first_row + 1, last).to(tl.int64)
    if IS_GATED:
        row2, row3 = row0 + num_features, row1 + num_features
    else:
        row2, row3 = tl.minimum(first_row + 2, last).to(tl.int64), tl.minimum(first_row + 3, last).to(tl.int64)
    lanes = tl.arange(0, LANES)
    zeros = tl.zeros((LANES,), tl.float32)
    sums0, sums1, sums2, sums3 = zeros, zeros, zeros, zeros
    squares = zeros
    for first in range(0, width, LANES):
        lane = first + lanes
        is_in = lane < width
        code0, code1 = _codes(codes, row0, lane, is_in, width), _codes(codes, row1, lane, is_in, width)
        code2, code3 = _codes(codes, row2, lane, is_in, width), _codes(codes, row3, lane, is_in, width)
        value, square = normed_input(x, norm, lane, is_in, offset, HAS_NORM)
        squares += square
        sums0 += code0 * value
        sums1 += code1 * value
        sums2 += code2 * value
        sums3 += code3 * value
    scale = 1.0
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / width + eps)
    total0 = _total(sums0, scale, row0, scales, biases, HAS_BIAS)
    total1 = _total(sums1, scale, row1, scales, biases, HAS_BIAS)
    total2 = _total(sums2, scale, row2, scales, biases, HAS_BIAS)
    total3 = _total(sums3, scale, row3, scales, biases, HAS_BIAS)
    if IS_GATED:
        put(activated(total0, IS_GELU) * total2, row0, True, y, False)
        put(activated(total1, IS_GELU) * total3, row1, first_row + 1 <= last, y, False)
    else:
        put(total0, row0, True, y, ADDS)
        put(total1, row1, first_row + 1 <= last, y, ADDS)
        put(total2, row2, first_row + 2 <= last, y, ADDS)
        put(total3, row3, first_row + 3 <= last, y, ADDS)
