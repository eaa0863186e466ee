"""RMSNorm and the gate of the MLP as Triton kernels: one pass over the data each."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.device import Activation


def rms_norm(
    residual: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, scale: float = 1.0
) -> torch.Tensor:
    """float32[T, features] -> [T, features] in `weight`'s dtype (arXiv 1910.07467).

    Multiplied by (weight + offset) * scale.
    """
    y = torch.empty(residual.shape, dtype=weight.dtype, device=residual.device)
    _norm(residual, weight, y, eps, offset=offset, scale=scale)
    return y


def add_rms_norm(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0
) -> None:
    """residual += the norm of x [T, features]. `residual` is float32."""
    _norm(x, weight, residual, eps, offset=offset, adds=True)


def norm_columns(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    squares: torch.Tensor | None = None,
    num_normed: int = 0,
) -> None:
    """Norm columns [T, features] of larger rows in place.

    `squares`: float32[T], each row's sum of squares of `num_normed` numbers, of which these columns are a part.
    """
    _norm(x, weight, x, eps, offset=offset, squares=squares, num_normed=num_normed)


def square_sums(x: torch.Tensor, first: tuple[int, int], num: tuple[int, int]) -> torch.Tensor:
    """Sums of squares of two parts of each row: `num` columns from `first` on. [T, features] -> float32[T, 2]"""
    sums = torch.empty((len(x), 2), dtype=torch.float32, device=x.device)
    if len(x):
        key = (x.device.index, x.dtype, *first, *num, *alignment(x, x.stride(0)))
        _launch_square_sums((len(x), 2), x, sums, x.stride(0), *first, *num, 1024, key=key)
    return sums


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    eps: float,
    *,
    offset: float,
    scale: float = 1.0,
    adds: bool = False,
    squares: torch.Tensor | None = None,
    num_normed: int = 0,
) -> None:
    num_tokens, width = x.shape
    if not num_tokens:
        return
    block = triton.next_power_of_2(width)
    num_warps = max(1, min(16, block // 512))
    strides = x.stride(0), y.stride(0)
    has_squares, stride = (False, 0) if squares is None else (True, squares.stride(0))
    sums = weight if squares is None else squares  # a pointer that is not read
    aligned = alignment(x, weight, y, sums, *strides, stride, num_normed)
    key = (x.device.index, x.dtype, weight.dtype, y.dtype, sums.dtype, width, adds, has_squares, stride == 1, *aligned)
    parameters = (width, eps, offset, scale, sums, stride, num_normed, block, adds, has_squares)
    _launch_norm((num_tokens,), x, weight, y, *strides, *parameters, key=key, num_warps=num_warps)


def activate_mul(
    gate_up: torch.Tensor, activation: Activation, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """activation(gate) * up of rows [gate, up]: [T, 2 n] -> [T, n], in `dtype` if it is given.

    Or of rows that are a sum of P rows still to be made, [P, T, 2 n].
    """
    num_parts = 1 if gate_up.ndim == 2 else len(gate_up)
    num_tokens, width = gate_up.shape[-2], gate_up.shape[-1] // 2
    y = torch.empty((num_tokens, width), dtype=dtype or gate_up.dtype, device=gate_up.device)
    if num_tokens:
        block = 1024
        grid = (num_tokens, triton.cdiv(width, block))  # only the first size of a grid may be above 65,535
        size = 2 * width * num_tokens  # of a part
        key = (gate_up.device.index, gate_up.dtype, y.dtype, width, num_parts, activation, *alignment(gate_up, size))
        _launch_activate_mul(grid, gate_up, y, width, size, num_parts, block, activation == "gelu_tanh", key=key)
    return y


@triton.jit
def _norm_kernel(
    x,
    weight,
    y,
    x_stride,
    y_stride,
    width,
    eps,
    offset,
    factor,
    squares,
    squares_stride,
    num_normed,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    is_in = at < width
    value = tl.load(x + row * x_stride + at, mask=is_in, other=0.0).to(tl.float32)
    if HAS_SQUARES:
        scale = tl.rsqrt(tl.load(squares + row * squares_stride) / num_normed + eps)
    else:
        scale = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    by = (tl.load(weight + at, mask=is_in, other=0.0).to(tl.float32) + offset) * factor
    result = value * scale * by
    to = y + row * y_stride + at
    if ADDS:
        result += tl.load(to, mask=is_in, other=0.0)
    tl.store(to, result.to(y.dtype.element_ty), mask=is_in)


@triton.jit
def _square_sums_kernel(x, sums, stride, first, second, num_first, num_second, BLOCK: tl.constexpr):
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.where(which == 0, first, second)
    num = tl.where(which == 0, num_first, num_second)
    squares = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, num, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        value = tl.load(x + row * stride + start + columns, mask=columns < num, other=0.0).to(tl.float32)
        squares += value * value
    tl.store(sums + row * 2 + which, tl.sum(squares, 0))


@triton.jit
def normed_input(x, norm, at, mask, offset, HAS_NORM: tl.constexpr):
    """Inputs as float32, and their squares. With a norm they are multiplied by its weights; its scale is left out."""
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        by = tl.load(norm + at, mask=mask, other=0.0).to(tl.float32) + offset
        return value * by, value * value
    return value, value


@triton.jit
def activated(x, IS_GELU: tl.constexpr):
    """SiLU, or GELU with its approximation by tanh: x / 2 (1 + tanh z) is x sigmoid(2 z)."""
    if IS_GELU:
        z = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
    else:
        z = x
    return x / (1.0 + tl.exp(-z))


@triton.jit
def _activate_mul_kernel(
    gate_up, y, width, part_size, PARTS: tl.constexpr, BLOCK: tl.constexpr, IS_GELU: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < width
    gate, up = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        line = gate_up + part * part_size + row * 2 * width
        gate += tl.load(line + at, mask=is_in, other=0.0).to(tl.float32)
        up += tl.load(line + width + at, mask=is_in, other=0.0).to(tl.float32)
    value = activated(gate, IS_GELU) * up
    tl.store(y + row * width + at, value.to(y.dtype.element_ty), mask=is_in)


_launch_norm = Launcher(_norm_kernel)
_launch_square_sums = Launcher(_square_sums_kernel)
_launch_activate_mul = Launcher(_activate_mul_kernel)
