"""The experts of a few tokens, in two kernels: each row by itself, at the memory's speed.

Nothing is grouped. The first kernel chooses and computes gate and up, a program for some features of one expert of a
token; the second computes down of all experts of a token and adds their sum by weight.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.experts.fp4 import load_fp4, low_inputs
from headwater.devices.cuda.kernels.experts.gate import gated
from headwater.devices.cuda.kernels.experts.route import orderable
from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.cuda.kernels.layers import normed_input
from headwater.devices.cuda.kernels.rows import PlainRows, UnnormedRows, norm_arguments
from headwater.devices.cuda.products.mxfp4_matrix import Stack, parts_of

MOST_TOKENS = 4  # beyond, tokens share experts, whose weights are read once in tiles
# features of a program and inputs at a time, of gate and up, and of down: the fastest of those tried on an H200
_OF_ONE_TOKEN = ((8, 2048), (2, 1024))
_OF_SOME_TOKENS = ((16, 256), (8, 256))
_OF_FP4 = ((8, 1024), (4, 1024))


def _shape(num_tokens: int, *, is_fp4: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    return _OF_FP4 if is_fp4 else _OF_ONE_TOKEN if num_tokens == 1 else _OF_SOME_TOKENS


def few_gated_rows(
    x: PlainRows,
    logits: torch.Tensor,
    weight: Stack,
    *,
    per_token: int,
    bias: torch.Tensor | None = None,
    is_clamped: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(x Wg^T + bg) * (x Wu^T + bu) of each token's experts, and which they are, the heaviest first.

    x [T, in], logits float32[T, E], W [E, 2 inner, in], b [E, 2 inner] -> [T * K, inner], int32[T * K]. `is_clamped`:
    with the activation "clamped_swiglu" of device.py.
    """
    num_tokens, width = len(x), weight.shape[2]
    num_experts, inner = weight.shape[0], weight.shape[1] // 2
    y = torch.empty((num_tokens * per_token, inner), dtype=x.dtype, device=x.device)
    experts = torch.empty(num_tokens * per_token, dtype=torch.int32, device=x.device)
    if num_tokens:
        codes, exponents = parts_of(weight)
        is_normed = isinstance(x, UnnormedRows)
        rows, norm, eps, offset = norm_arguments(x)
        is_fp4, biases = exponents is not codes, rows if bias is None else bias
        (features, most), _ = _shape(num_tokens, is_fp4=is_fp4)
        block = min(most, triton.next_power_of_2(width))
        sizes = (width, inner, num_experts, triton.next_power_of_2(num_experts), per_token, features, block)
        flags = (bias is not None, is_clamped, is_fp4, is_normed)
        pointers = (rows, norm, logits, codes, exponents, biases, y)
        key = (x.device.index, *(each.dtype for each in pointers), *sizes, *flags, *alignment(*pointers))
        grid = (triton.cdiv(inner, features), num_tokens * per_token)
        _launch_gated(grid, *pointers, experts, eps, offset, *sizes, *flags, key=key)
    return y, experts


def few_sums(
    inner: torch.Tensor,
    logits: torch.Tensor,
    experts: torch.Tensor,
    weight: Stack,
    y: torch.Tensor,
    *,
    renormalises: bool,
    adds: bool,
    bias: torch.Tensor | None = None,
) -> None:
    """The sum by weight of inner Wd^T + bd, the heaviest first, added to y or stored.

    inner [T * K, inner], W [E, out, inner], b [E, out], y [T, out]
    """
    num_tokens, num_experts = logits.shape
    if not num_tokens:
        return
    outputs, width = weight.shape[1:]
    per_token = len(experts) // num_tokens
    codes, exponents = parts_of(weight)
    is_fp4, biases = exponents is not codes, inner if bias is None else bias
    _, (features, most) = _shape(num_tokens, is_fp4=is_fp4)
    block = min(most, triton.next_power_of_2(width))
    blocks = triton.next_power_of_2(num_experts), triton.next_power_of_2(per_token)
    sizes = (width, outputs, num_experts, blocks[0], per_token, blocks[1])
    flags = (renormalises, adds, features, block, bias is not None, is_fp4)
    types = (inner.dtype, biases.dtype, y.dtype)
    key = (inner.device.index, *types, *sizes, *flags, *alignment(inner, logits, codes, exponents, biases, y))
    grid = (triton.cdiv(outputs, features), num_tokens)
    _launch_sums(grid, inner, logits, experts, codes, exponents, biases, y, *sizes, *flags, key=key)


@triton.jit
def _few_gated_kernel(
    x, norm, logits, weight, exponents, bias, y, experts, eps, offset,
    WIDTH: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr,
    PER_TOKEN: tl.constexpr, FEATURES: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_CLAMPED: tl.constexpr, IS_FP4: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    token, place = row // PER_TOKEN, row % PER_TOKEN
    at = tl.arange(0, EXPERT_BLOCK)
    values = tl.load(logits + token * EXPERTS + at, mask=at < EXPERTS, other=0.0)
    left = tl.where(at < EXPERTS, orderable(values), -float("inf"))
    expert = tl.argmax(left, 0)
    for _ in range(place):
        left = tl.where(at == expert, -float("inf"), left)
        expert = tl.argmax(left, 0)
    if tl.program_id(0) == 0:
        tl.store(experts + row, expert)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    is_feature = feature < INNER
    column = tl.arange(0, BLOCK)
    w_at = weight + (expert.to(tl.int64) * 2 * INNER + feature)[:, None] * WIDTH + column[None, :]
    x_at = x + token * WIDTH
    LANES: tl.constexpr = BLOCK // 2 if IS_FP4 else BLOCK
    squares = tl.zeros((LANES,), tl.float32)
    gates = tl.zeros((FEATURES, LANES), tl.float32)
    ups = tl.zeros((FEATURES, LANES), tl.float32)
    if IS_FP4:
        byte = tl.arange(0, LANES)
        low_column = low_inputs(byte)
        row_at = expert.to(tl.int64) * 2 * INNER + feature
        b_at = weight + row_at[:, None] * (WIDTH // 2) + byte[None, :]
        e_at = exponents + row_at[:, None] * (WIDTH // 32) + (low_column // 32)[None, :]
        for first in range(0, WIDTH, BLOCK):
            is_column = first + low_column < WIDTH
            is_weight = is_feature[:, None] & is_column[None, :]
            a, a_square = normed_input(x_at, norm, first + low_column, is_column, offset, HAS_NORM)
            c, c_square = normed_input(x_at, norm, first + low_column + 16, is_column, offset, HAS_NORM)
            squares += a_square + c_square
            low, high = load_fp4(b_at + first // 2, e_at + first // 32, is_weight)
            gates += low * a[None, :] + high * c[None, :]
            up_at, up_exponents = b_at + INNER * (WIDTH // 2), e_at + INNER * (WIDTH // 32)
            low, high = load_fp4(up_at + first // 2, up_exponents + first // 32, is_weight)
            ups += low * a[None, :] + high * c[None, :]
    else:
        for first in range(0, WIDTH, BLOCK):
            is_column = first + column < WIDTH
            is_weight = is_feature[:, None] & is_column[None, :]
            value, square = normed_input(x_at, norm, first + column, is_column, offset, HAS_NORM)
            squares += square
            w = tl.load(w_at + first, mask=is_weight, other=0.0, eviction_policy="evict_first").to(tl.float32)
            gates += w * value[None, :]
            up_at = w_at + INNER * WIDTH + first
            w = tl.load(up_at, mask=is_weight, other=0.0, eviction_policy="evict_first").to(tl.float32)
            ups += w * value[None, :]
    gate, up = tl.sum(gates, 1), tl.sum(ups, 1)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
        gate, up = gate * scale, up * scale
    if HAS_BIAS:
        bias_at = bias + expert.to(tl.int64) * 2 * INNER + feature
        gate += tl.load(bias_at, mask=is_feature, other=0.0).to(tl.float32)
        up += tl.load(bias_at + INNER, mask=is_feature, other=0.0).to(tl.float32)
    result = gated(gate, up, IS_CLAMPED)
    tl.store(y + row * INNER + feature, result.to(y.dtype.element_ty), mask=is_feature)


@triton.jit
def _few_sums_kernel(
    inner, logits, experts, weight, exponents, bias, y,
    WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr,
    PER_TOKEN: tl.constexpr, PLACES: tl.constexpr, RENORMALISES: tl.constexpr, ADDS: tl.constexpr,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, IS_FP4: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    chosen, line = experts + token * PER_TOKEN, logits + token * EXPERTS
    largest = tl.load(line + tl.load(chosen))
    total = tl.exp(largest - largest) - 1.0  # 0, or NaN where the logits are not finite
    if RENORMALISES:
        places = tl.arange(0, PLACES)
        is_place = places < PER_TOKEN
        values = tl.load(line + tl.load(chosen + places, mask=is_place, other=0), mask=is_place, other=-float("inf"))
        total += tl.sum(tl.exp(values - largest), 0)
    else:
        at = tl.arange(0, EXPERT_BLOCK)
        values = tl.load(line + at, mask=at < EXPERTS, other=-float("inf"))
        total += tl.sum(tl.exp(values - largest), 0)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    is_feature = feature < OUTPUTS
    column = tl.arange(0, BLOCK)
    LANES: tl.constexpr = BLOCK // 2 if IS_FP4 else BLOCK
    sums = tl.zeros((FEATURES,), tl.float32)
    products = tl.zeros((FEATURES, LANES), tl.float32)
    for place in tl.static_range(PER_TOKEN):  # unrolled, so that the loads wait together
        expert = tl.load(chosen + place).to(tl.int64)
        share = tl.exp(tl.load(line + expert) - largest) / total
        w_at = weight + (expert * OUTPUTS + feature)[:, None] * WIDTH + column[None, :]
        x_at = inner + (token * PER_TOKEN + place) * WIDTH + column
        if IS_FP4:
            byte = tl.arange(0, LANES)
            low_column = low_inputs(byte)
            row_at = expert * OUTPUTS + feature
            b_at = weight + row_at[:, None] * (WIDTH // 2) + byte[None, :]
            e_at = exponents + row_at[:, None] * (WIDTH // 32) + (low_column // 32)[None, :]
            low_at = inner + (token * PER_TOKEN + place) * WIDTH + low_column
            for first in range(0, WIDTH, BLOCK):
                is_column = first + low_column < WIDTH
                a = tl.load(low_at + first, mask=is_column, other=0.0).to(tl.float32)[None, :]
                c = tl.load(low_at + first + 16, mask=is_column, other=0.0).to(tl.float32)[None, :]
                is_weight = is_feature[:, None] & is_column[None, :]
                low, high = load_fp4(b_at + first // 2, e_at + first // 32, is_weight)
                products += (low * a + high * c) * share
        else:
            for first in range(0, WIDTH, BLOCK):
                is_column = first + column < WIDTH
                is_weight = is_feature[:, None] & is_column[None, :]
                value = tl.load(x_at + first, mask=is_column, other=0.0).to(tl.float32)
                w = tl.load(w_at + first, mask=is_weight, other=0.0, eviction_policy="evict_first").to(tl.float32)
                products += w * (value * share)[None, :]
        if HAS_BIAS:
            sums += share * tl.load(bias + expert * OUTPUTS + feature, mask=is_feature, other=0.0).to(tl.float32)
    sums += tl.sum(products, 1)
    y_at = y + token * OUTPUTS + feature
    if ADDS:
        sums += tl.load(y_at, mask=is_feature, other=0.0)
    tl.store(y_at, sums.to(y.dtype.element_ty), mask=is_feature)


_launch_gated = Launcher(_few_gated_kernel)
_launch_sums = Launcher(_few_sums_kernel)
