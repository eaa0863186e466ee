"""Activations in float8, and the passes between products, each in one kernel: sums into the residual stream, norms,
gates, and the rounding of what the next product reads.

Float8 has a scale for each token, or for each token and group of inputs (products/scaled_product.py).
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.cuda.kernels.layers import activated
from headwater.devices.cuda.kernels.rows import Parts, RoundedRows, Scales, Unscaled
from headwater.devices.device import Activation

_ROUNDED_AT_ONCE = 4096
_LARGEST = tl.constexpr(448.0)
_MOST_REGISTERS = 64  # of a thread: two programs of a wide row fit in a multiprocessor
_FEW_ROWS = 256  # up to which a program for each row leaves most of the card idle
_PIECE = 1024  # of a row, then


def round_tokens(x: torch.Tensor, group: int) -> RoundedRows:
    """Each token's groups of inputs as float8 with a scale. [T, in]"""
    num_tokens, width = x.shape
    y = RoundedRows.empty(num_tokens, width, group=group, like=x)
    if num_tokens:
        num_groups = y.scales.shape[1]
        block = triton.next_power_of_2(group)
        groups = max(1, min(triton.next_power_of_2(num_groups), _ROUNDED_AT_ONCE // block))
        num_warps = max(1, min(16, groups * block // 512))
        sizes = (width, num_groups)
        flags = (group, groups, block)
        key = (x.device.index, x.dtype, *sizes, *flags, *alignment(x, y.codes, y.scales))
        grid = (num_tokens, triton.cdiv(num_groups, groups))
        _launch_round(grid, x, y.codes.view(torch.int8), y.scales, *sizes, *flags, key=key, num_warps=num_warps)
    return y


def can_round_rows(width: int, group: int) -> bool:
    """Whether the kernels below round rows of `width` in groups: whole rows, or groups of a power of two."""
    return group >= width or (width % group == 0 and group & -group == group)


def add_and_norm(
    parts: Parts | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    group: int | None = None,
) -> torch.Tensor | RoundedRows:
    """Add parts to the residual, float32[T, features], and norm it: [T, features] in `weight`'s dtype.

    Rounded to float8 if `group` is given, the inputs that share a scale (`can_round_rows`).
    """
    num_tokens, width = residual.shape
    if group is None:
        y = torch.empty((num_tokens, width), dtype=weight.dtype, device=residual.device)
        codes, scales = y, residual
    else:
        y = RoundedRows.empty(num_tokens, width, group=group, like=weight)
        codes, scales = y.codes.view(torch.int8), y.scales
    if not num_tokens:
        return y
    rows, num_parts = (residual, 0) if parts is None else (parts.rows, parts.num_parts)
    given = (None,) * 5
    if parts is not None:
        of_rows, of_columns = (None, None) if parts.scales is None else (parts.scales.of_rows, parts.scales.of_columns)
        given = (parts.bias, parts.weights, parts.places, of_rows, of_columns)
    has = tuple(each is not None for each in given[:4])
    beside = tuple(residual if each is None else each for each in given)
    block = triton.next_power_of_2(width)
    lanes = block if group is None or group >= width else group
    flags = (num_parts, *has, group is not None, width, block, lanes)
    pointers = (rows, *beside, residual, weight, codes, scales)
    key = (residual.device.index, *(each.dtype for each in pointers), *flags, *alignment(*pointers))
    num_warps = max(1, min(16, block // 512))
    _launch_add_norm((num_tokens,), *pointers, num_tokens, eps, offset, *flags, key=key, num_warps=num_warps)
    return y


def activate_round(halves: torch.Tensor | Unscaled, activation: Activation, *, group: int) -> RoundedRows:
    """activation(gate) * up of rows [gate, up], rounded to float8. [T, 2 n] -> [T, n]

    `group`: inputs that share a scale (`can_round_rows`).
    """
    gate_up = halves.product if isinstance(halves, Unscaled) else halves
    scales = halves.scales if isinstance(halves, Unscaled) else None
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = RoundedRows.empty(num_tokens, width, group=group, like=gate_up)
    if not num_tokens:
        return y
    is_whole = group >= width
    if is_whole and num_tokens <= _FEW_ROWS and width > 2 * _PIECE:
        return _activate_round_in_pieces(gate_up, scales, y, activation)
    block = triton.next_power_of_2(width if is_whole else max(group, min(width, 1024)))
    lanes = block if is_whole else group
    flags = (width, y.scales.shape[1], block, lanes, activation == "gelu_tanh", scales is not None)
    beside = (y.scales, y.scales) if scales is None else (scales.of_rows, scales.of_columns)
    key = (gate_up.device.index, gate_up.dtype, *flags, *alignment(gate_up, *beside))
    num_warps = max(1, min(16, block // 512))
    _launch_activate(
        (num_tokens, triton.cdiv(width, block)), gate_up, *beside, y.codes.view(torch.int8), y.scales, *flags,
        key=key, num_warps=num_warps, maxnreg=_MOST_REGISTERS if block > 4096 else None,
    )  # fmt: skip
    return y


def _activate_round_in_pieces(
    gate_up: torch.Tensor, scales: Scales | None, y: RoundedRows, activation: Activation
) -> RoundedRows:
    """A kernel finds the largest number of each piece of a row, a second one rounds."""
    num_tokens, width = y.codes.shape
    num_pieces = triton.cdiv(width, _PIECE)
    plain = torch.empty((num_tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    largest = torch.empty((num_tokens, num_pieces), dtype=torch.float32, device=gate_up.device)
    beside = (largest, largest) if scales is None else (scales.of_rows, scales.of_columns)
    flags = (width, num_pieces, _PIECE, activation == "gelu_tanh", scales is not None)
    key = (gate_up.device.index, gate_up.dtype, *flags, *alignment(gate_up, *beside))
    grid = (num_tokens, num_pieces)
    _launch_piece(grid, gate_up, *beside, plain, largest, *flags, key=key)
    shape = (width, num_pieces, triton.next_power_of_2(num_pieces), _PIECE)
    key = (gate_up.device.index, gate_up.dtype, *shape)
    _launch_round_piece(grid, plain, largest, y.codes.view(torch.int8), y.scales, *shape, key=key)
    return y


@triton.jit
def _scale_of(largest):
    """What makes the largest number float8's largest; 1 where all are 0."""
    return tl.where(largest > 0, largest, _LARGEST) / _LARGEST


@triton.jit
def _code_of(value):
    """Scaled numbers as float8, as int8."""
    return tl.minimum(tl.maximum(value, -_LARGEST), _LARGEST).to(tl.float8e4nv).to(tl.int8, bitcast=True)


@triton.jit
def _round_kernel(
    x, codes, scales, width, num_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, BLOCK)
    place = group[:, None] * GROUP + column[None, :]
    at = token * width + place
    is_in = (place < width) & (column < GROUP)[None, :]
    value = tl.load(x + at, mask=is_in, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.abs(value), 1))
    tl.store(codes + at, _code_of(value / scale[:, None]), mask=is_in)
    tl.store(scales + token * num_groups + group, scale, mask=group < num_groups)


@triton.jit
def _put_rounded(value, codes, scales, first, width, num_groups, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Store BLOCK numbers of a row from `first` on as float8 in groups of LANES; 0 where they are beyond the width.

    `codes` and `scales` are those of the row.
    """
    GROUPS: tl.constexpr = BLOCK // LANES
    at = first + tl.arange(0, BLOCK)
    if GROUPS == 1:
        scale = _scale_of(tl.max(tl.abs(value), 0))
        tl.store(codes + at, _code_of(value / scale), mask=at < width)
        tl.store(scales + first // LANES, scale)
    else:
        lines = tl.reshape(value, (GROUPS, LANES))
        scale = _scale_of(tl.max(tl.abs(lines), 1))
        tl.store(codes + at, tl.reshape(_code_of(lines / scale[:, None]), (BLOCK,)), mask=at < width)
        group = first // LANES + tl.arange(0, GROUPS)
        tl.store(scales + group, scale, mask=group < num_groups)


@triton.jit(do_not_specialize=["num_tokens"])
def _add_norm_kernel(
    parts, bias, weights, places, of_rows, of_columns, residual, weight, codes, scales, num_tokens, eps, offset,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_PLACES: tl.constexpr,
    HAS_SCALES: tl.constexpr, ROUNDS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    is_in = at < WIDTH
    value = tl.load(residual + token * WIDTH + at, mask=is_in, other=0.0)
    if PARTS > 0:
        total = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            row = part * num_tokens.to(tl.int64) + token
            if HAS_WEIGHTS:
                row = token * PARTS + part
            if HAS_PLACES:
                row = tl.load(places + row).to(tl.int64)
            each = tl.load(parts + row * WIDTH + at, mask=is_in, other=0.0).to(tl.float32)
            if HAS_WEIGHTS:
                each *= tl.load(weights + token * PARTS + part)
            total += each
        if HAS_SCALES:
            total *= tl.load(of_rows + token) * tl.load(of_columns + at, mask=is_in, other=0.0)
        if HAS_BIAS:
            total += tl.load(bias + at, mask=is_in, other=0.0).to(tl.float32)
        value += total
        tl.store(residual + token * WIDTH + at, value, mask=is_in)
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    by = tl.load(weight + at, mask=is_in, other=0.0).to(tl.float32) + offset
    result = (value * scale * by).to(weight.dtype.element_ty)
    if ROUNDS:
        NUM_GROUPS: tl.constexpr = (WIDTH + LANES - 1) // LANES
        line, line_scales = codes + token * WIDTH, scales + token * NUM_GROUPS
        _put_rounded(result.to(tl.float32), line, line_scales, 0, WIDTH, NUM_GROUPS, BLOCK, LANES)
    else:
        tl.store(codes + token * WIDTH + at, result, mask=is_in)


@triton.jit
def _activated(
    gate_up, of_rows, of_columns, token, at, WIDTH: tl.constexpr, IS_GELU: tl.constexpr, HAS_SCALES: tl.constexpr
):
    """Some numbers of a row in the dtype of products; 0 beyond the width."""
    is_in = at < WIDTH
    line = gate_up + token * (2 * WIDTH)
    gate = tl.load(line + at, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(line + WIDTH + at, mask=is_in, other=0.0).to(tl.float32)
    if HAS_SCALES:
        of_row = tl.load(of_rows + token)
        gate *= of_row * tl.load(of_columns + at, mask=is_in, other=0.0)
        up *= of_row * tl.load(of_columns + WIDTH + at, mask=is_in, other=0.0)
    return (activated(gate, IS_GELU) * up).to(gate_up.dtype.element_ty)


@triton.jit
def _activate_piece_kernel(
    gate_up, of_rows, of_columns, y, largest,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, IS_GELU: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    value = _activated(gate_up, of_rows, of_columns, token, at, WIDTH, IS_GELU, HAS_SCALES)
    tl.store(y + token * WIDTH + at, value, mask=at < WIDTH)
    tl.store(largest + token * PIECES + tl.program_id(1), tl.max(tl.abs(value.to(tl.float32)), 0))


@triton.jit
def _round_piece_kernel(
    x, largest, codes, scales,
    WIDTH: tl.constexpr, PIECES: tl.constexpr, PIECES_BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, PIECES_BLOCK)
    at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    value = tl.load(x + token * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    scale = _scale_of(tl.max(tl.load(largest + token * PIECES + piece, mask=piece < PIECES, other=0.0), 0))
    tl.store(codes + token * WIDTH + at, _code_of(value / scale), mask=at < WIDTH)
    if tl.program_id(1) == 0:
        tl.store(scales + token, scale)


@triton.jit
def _activate_round_kernel(
    gate_up, of_rows, of_columns, codes, scales,
    WIDTH: tl.constexpr, NUM_GROUPS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, IS_GELU: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    at = first + tl.arange(0, BLOCK)
    value = _activated(gate_up, of_rows, of_columns, token, at, WIDTH, IS_GELU, HAS_SCALES).to(tl.float32)
    _put_rounded(value, codes + token * WIDTH, scales + token * NUM_GROUPS, first, WIDTH, NUM_GROUPS, BLOCK, LANES)


_launch_round = Launcher(_round_kernel)
_launch_add_norm = Launcher(_add_norm_kernel)
_launch_activate = Launcher(_activate_round_kernel)
_launch_piece = Launcher(_activate_piece_kernel)
_launch_round_piece = Launcher(_round_piece_kernel)
