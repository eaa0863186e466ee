"""Linear layers of one token, or of up to four where W is small: plain multiplications at the memory's speed.

A library's matrix product pads so few tokens to a tile and leaves most of the card idle where W is small. Here a
program computes a few output features from whole rows of W; the norm before it, the residual's addition and the MLP's
gate are part of it.
Measured on an H200 against cuBLAS: level or up to a quarter faster for 8B shapes, up to four times for 0.6B shapes.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.few_rows.stream import stream, suits_stream
from headwater.devices.cuda.kernels.layers import activated, normed_input
from headwater.devices.cuda.kernels.rows import PlainRows, UnnormedRows, norm_arguments
from headwater.devices.device import Activation

_MAX_TOKENS = 4
_LARGE_GATED = 1 << 26  # weights from which cuBLAS and a kernel for the gate are as quick
_SMALL_OUTPUT = 2048  # up to here cuBLAS runs too few programs, for some tokens as for one


def suits(num_tokens: int, num_features: int) -> bool:
    """Whether `linear` and `add_linear` are the faster way."""
    return num_tokens == 1 or (num_tokens <= _MAX_TOKENS and num_features <= _SMALL_OUTPUT)


def suits_logits(num_tokens: int, num_features: int) -> bool:
    """Whether `linear` in float32 is the faster way: for a router, not for a head."""
    return num_tokens <= _MAX_TOKENS and num_features <= _SMALL_OUTPUT


def suits_gated(num_tokens: int, weight: torch.Tensor) -> bool:
    """Whether `gated_linear` is the faster way."""
    return num_tokens == 1 and (weight.numel() < _LARGE_GATED or suits_stream(weight, is_gated=True))


def linear(
    x: PlainRows, weight: torch.Tensor, bias: torch.Tensor | None, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x W^T + b in x's dtype, or in that given. [T, in], [out, in], [out] -> [T, out]"""
    y = torch.empty((len(x), len(weight)), dtype=x.dtype if dtype is None else dtype, device=x.device)
    _launch(x, weight, bias, y)
    return y


def add_linear(residual: torch.Tensor, x: PlainRows, weight: torch.Tensor) -> None:
    """residual += x W^T, of float32[T, out]."""
    _launch(x, weight, None, residual, adds=True)


def gated_linear(
    x: PlainRows, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation = "silu"
) -> torch.Tensor:
    """activation(x Wg^T + bg) * (x Wu^T + bu) of `weight` [Wg, Wu], one below the other. [1, in] -> [1, out]"""
    y = torch.empty((len(x), len(weight) // 2), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, y, is_gated=True, is_gelu=activation == "gelu_tanh")
    return y


def _launch(
    x: PlainRows,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    *,
    adds: bool = False,
    is_gated: bool = False,
    is_gelu: bool = False,
) -> None:
    num_tokens, (num_features, width) = len(x), weight.shape
    num_features = num_features // 2 if is_gated else num_features
    assert num_tokens <= (1 if is_gated else _MAX_TOKENS)
    if num_tokens == 1 and suits_stream(weight, is_gated=is_gated):
        return stream(x, weight, None, bias, y, adds=adds, is_gated=is_gated, is_gelu=is_gelu)
    features, block, num_warps = 8, 512, 4
    if num_features <= _SMALL_OUTPUT and not is_gated:  # or too few programs would run
        features, block, num_warps = (2, 1024, 4) if num_tokens == 1 else (4, 1024, 8)
    rows, norm, eps, offset = norm_arguments(x)
    _skinny_kernel[(triton.cdiv(num_features, features),)](
        rows,
        norm,
        weight,
        weight if bias is None else bias,
        y,
        width,
        num_features,
        eps,
        offset,
        TOKENS=num_tokens,
        FEATURES=features,
        BLOCK=min(block, triton.next_power_of_2(width)),
        HAS_NORM=isinstance(x, UnnormedRows),
        HAS_BIAS=bias is not None,
        ADDS=adds,
        IS_GATED=is_gated,
        IS_GELU=is_gelu,
        num_warps=num_warps,
    )


@triton.jit
def _norm_scale(squares, width, eps, HAS_NORM: tl.constexpr):
    if HAS_NORM:
        return tl.rsqrt(tl.sum(squares, 0) / width + eps)
    return 1.0


@triton.jit
def _finish(sums, scale, bias, y_at, is_in, ADDS: tl.constexpr):
    """One token's features from the partial sums of its columns."""
    value = tl.sum(sums, 1) * scale + bias
    if ADDS:
        value += tl.load(y_at, mask=is_in, other=0.0)
    tl.store(y_at, value.to(y_at.dtype.element_ty), mask=is_in)


@triton.jit
def _skinny_kernel(
    x,
    norm,
    weight,
    biases,
    y,
    width,
    num_features,
    eps,
    offset,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_GELU: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    is_in = feature < num_features
    columns = tl.arange(0, BLOCK)
    line = weight + feature.to(tl.int64)[:, None] * width
    up_line = line + num_features.to(tl.int64) * width
    zeros = tl.zeros((FEATURES, BLOCK), tl.float32)
    none = tl.zeros((BLOCK,), tl.float32)
    sums0, sums1, sums2, sums3 = zeros, zeros, zeros, zeros
    squares0, squares1, squares2, squares3 = none, none, none, none
    ups = zeros
    for first in range(0, width, BLOCK):
        at = first + columns
        is_column = at < width
        is_weight = is_in[:, None] & is_column[None, :]
        # read once and never again: what other kernels need stays in the cache
        w = tl.load(line + at[None, :], mask=is_weight, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x0, square0 = normed_input(x, norm, at, is_column, offset, HAS_NORM)
        sums0 += w * x0[None, :]
        squares0 += square0
        if TOKENS > 1:
            x1, square1 = normed_input(x + width, norm, at, is_column, offset, HAS_NORM)
            sums1 += w * x1[None, :]
            squares1 += square1
        if TOKENS > 2:
            x2, square2 = normed_input(x + 2 * width, norm, at, is_column, offset, HAS_NORM)
            sums2 += w * x2[None, :]
            squares2 += square2
        if TOKENS > 3:
            x3, square3 = normed_input(x + 3 * width, norm, at, is_column, offset, HAS_NORM)
            sums3 += w * x3[None, :]
            squares3 += square3
        if IS_GATED:
            u = tl.load(up_line + at[None, :], mask=is_weight, other=0.0, eviction_policy="evict_first").to(tl.float32)
            ups += u * x0[None, :]
    bias = tl.zeros((FEATURES,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(biases + feature, mask=is_in, other=0.0).to(tl.float32)
    scale = _norm_scale(squares0, width, eps, HAS_NORM)
    if IS_GATED:
        up = tl.sum(ups, 1) * scale
        if HAS_BIAS:
            up += tl.load(biases + num_features + feature, mask=is_in, other=0.0).to(tl.float32)
        gate = tl.sum(sums0, 1) * scale + bias
        value = activated(gate, IS_GELU) * up
        tl.store(y + feature, value.to(y.dtype.element_ty), mask=is_in)
        return
    _finish(sums0, scale, bias, y + feature, is_in, ADDS)
    if TOKENS > 1:
        scale1 = _norm_scale(squares1, width, eps, HAS_NORM)
        _finish(sums1, scale1, bias, y + num_features + feature, is_in, ADDS)
    if TOKENS > 2:
        scale2 = _norm_scale(squares2, width, eps, HAS_NORM)
        _finish(sums2, scale2, bias, y + 2 * num_features + feature, is_in, ADDS)
    if TOKENS > 3:
        scale3 = _norm_scale(squares3, width, eps, HAS_NORM)
        _finish(sums3, scale3, bias, y + 3 * num_features + feature, is_in, ADDS)
