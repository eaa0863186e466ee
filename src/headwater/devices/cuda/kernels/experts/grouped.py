"""Products of rows with the matrices of their experts, in tiles of rows of one expert; and the sum by weight.

Tiles are planned on the device (row_tiles.plan_tiles), so a CUDA graph routes anew whenever it runs. The grid is as
large as any routing needs: programs of tiles that this one does not need end at once.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.experts.fp4 import load_fp4, low_inputs
from headwater.devices.cuda.kernels.experts.gate import gated
from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.cuda.kernels.row_tiles import RowTiles
from headwater.devices.cuda.kernels.rows import Parts
from headwater.devices.cuda.products.mxfp4_matrix import Stack, parts_of

_SUM_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class TileShape:
    """How a product is cut: rows of a tile, outputs and inputs at a time."""

    rows: int
    features: int
    columns: int
    num_warps: int
    num_stages: int


# by the mean number of rows of an expert, up to which a shape suits
SHAPES = (
    (8.0, TileShape(16, 32, 128, 4, 3)),
    (32.0, TileShape(32, 64, 128, 4, 3)),
    (96.0, TileShape(64, 64, 64, 4, 3)),
    (float("inf"), TileShape(128, 128, 64, 8, 3)),
)
FIXED = TileShape(64, 64, 64, 4, 4)  # of --deterministic
_FLOAT32 = TileShape(16, 32, 32, 4, 2)  # for tests


def tile_shape(num_rows: int, num_experts: int, *, dtype: torch.dtype, is_fixed: bool = False) -> TileShape:
    """What suits `num_rows` rows, counted once for each of their experts."""
    if dtype == torch.float32:
        return _FLOAT32
    if is_fixed:
        return FIXED
    return next(shape for most, shape in SHAPES if num_rows <= most * num_experts)


def gated_rows(
    x: torch.Tensor,
    weight: Stack,
    tiles: RowTiles,
    shape: TileShape,
    *,
    per_token: int,
    bias: torch.Tensor | None = None,
    is_clamped: bool = False,
) -> torch.Tensor:
    """silu(x Wg^T + bg) * (x Wu^T + bu) of every row, [T * per_token, inner].

    x [T, in], W [E, 2 inner, in] (gate, then up), b [E, 2 inner]. `is_clamped`: with "clamped_swiglu" of device.py.
    """
    y = torch.empty((tiles.num_rows, weight.shape[1] // 2), dtype=x.dtype, device=x.device)
    _launch(x, weight, y, tiles, shape, rows_per_x=per_token, is_gated=True, bias=bias, is_clamped=is_clamped)
    return y


def down_rows(
    x: torch.Tensor, weight: Stack, tiles: RowTiles, shape: TileShape, *, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + b of every row: x [rows, inner], W [E, out, inner], b [E, out] -> [rows, out]"""
    y = torch.empty((tiles.num_rows, weight.shape[1]), dtype=x.dtype, device=x.device)
    _launch(x, weight, y, tiles, shape, rows_per_x=1, is_gated=False, bias=bias)
    return y


def sum_by_weight(parts: Parts, y: torch.Tensor, *, adds: bool) -> None:
    """The sum of each token's rows, the heaviest first, added to y [T, out] or stored there."""
    rows, weights, places = parts.rows, parts.weights, parts.places
    assert weights is not None
    num_tokens, per_token = weights.shape
    if not num_tokens:
        return
    width = rows.shape[1]
    flags = (per_token, adds, places is not None, _SUM_BLOCK)
    places = weights if places is None else places
    key = (y.device.index, rows.dtype, y.dtype, width, *flags, *alignment(rows, y))
    grid = (num_tokens, triton.cdiv(width, _SUM_BLOCK))
    _launch_sum(grid, rows, weights, places, y, width, *flags, key=key)


def _launch(
    x: torch.Tensor,
    weight: Stack,
    y: torch.Tensor,
    tiles: RowTiles,
    shape: TileShape,
    *,
    rows_per_x: int,
    is_gated: bool,
    bias: torch.Tensor | None,
    is_clamped: bool = False,
) -> None:
    if not tiles.num_rows:
        return
    assert tiles.size == shape.rows
    codes, exponents = parts_of(weight)
    num_features, biases = y.shape[1], x if bias is None else bias
    sizes = (x.shape[1], num_features, rows_per_x, is_gated, shape.rows, shape.features, shape.columns)
    sizes = (*sizes, bias is not None, is_clamped, exponents is not codes)
    key = (x.device.index, x.dtype, biases.dtype, *sizes, shape.num_warps, shape.num_stages)
    key = (*key, *alignment(x, codes, exponents, biases, tiles.slots, y))
    _launch_grouped(
        (triton.cdiv(num_features, shape.features), len(tiles.rows)),
        x, codes, exponents, biases, y, tiles.slots, tiles.rows, *sizes,
        key=key, num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip


@triton.jit
def _grouped_kernel(
    x, weight, exponents, bias, y, tile_slots, tile_rows,
    WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, ROWS_PER_X: tl.constexpr, IS_GATED: tl.constexpr,
    TILE: tl.constexpr, FEATURES: tl.constexpr, COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_CLAMPED: tl.constexpr, IS_FP4: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    slot = tl.load(tile_slots + tile).to(tl.int64)
    if slot == 0:
        return
    rows = tl.load(tile_rows + tile * TILE + tl.arange(0, TILE))
    is_row = (rows >= 0)[:, None]
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    is_feature = feature < OUTPUTS
    column = tl.arange(0, COLUMNS)
    x_at = x + (rows // ROWS_PER_X).to(tl.int64)[:, None] * WIDTH + column[None, :]
    outputs: tl.constexpr = 2 * OUTPUTS if IS_GATED else OUTPUTS
    w_at = weight + ((slot - 1) * outputs + feature)[:, None] * WIDTH + column[None, :]
    acc = tl.zeros((TILE, FEATURES), tl.float32)
    ups = tl.zeros((TILE, FEATURES), tl.float32)
    if IS_FP4:
        byte = tl.arange(0, COLUMNS // 2)
        low_column = low_inputs(byte)
        x_at = x + (rows // ROWS_PER_X).to(tl.int64)[:, None] * WIDTH + low_column[None, :]
        row_at = (slot - 1) * outputs + feature
        w_at = weight + row_at[:, None] * (WIDTH // 2) + byte[None, :]
        e_at = exponents + row_at[:, None] * (WIDTH // 32) + (low_column // 32)[None, :]
        for first in range(0, WIDTH, COLUMNS):
            is_column = (first + low_column < WIDTH)[None, :]
            is_weight = is_feature[:, None] & is_column
            a = tl.load(x_at + first, mask=is_row & is_column, other=0.0)
            c = tl.load(x_at + first + 16, mask=is_row & is_column, other=0.0)
            low, high = load_fp4(w_at + first // 2, e_at + first // 32, is_weight)
            acc = tl.dot(a, tl.trans(low.to(a.dtype)), acc, input_precision="ieee")
            acc = tl.dot(c, tl.trans(high.to(a.dtype)), acc, input_precision="ieee")
            if IS_GATED:
                up_at, up_exponents = w_at + OUTPUTS * (WIDTH // 2), e_at + OUTPUTS * (WIDTH // 32)
                low, high = load_fp4(up_at + first // 2, up_exponents + first // 32, is_weight)
                ups = tl.dot(a, tl.trans(low.to(a.dtype)), ups, input_precision="ieee")
                ups = tl.dot(c, tl.trans(high.to(a.dtype)), ups, input_precision="ieee")
    else:
        for first in range(0, WIDTH, COLUMNS):
            is_column = (first + column < WIDTH)[None, :]
            is_weight = is_feature[:, None] & is_column
            a = tl.load(x_at + first, mask=is_row & is_column, other=0.0)
            b = tl.load(w_at + first, mask=is_weight, other=0.0)
            acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
            if IS_GATED:
                u = tl.load(w_at + OUTPUTS * WIDTH + first, mask=is_weight, other=0.0)
                ups = tl.dot(a, tl.trans(u), ups, input_precision="ieee")
    if HAS_BIAS:
        bias_at = bias + (slot - 1) * outputs + feature
        acc += tl.load(bias_at, mask=is_feature, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            ups += tl.load(bias_at + OUTPUTS, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    if IS_GATED:
        acc = gated(acc, ups, IS_CLAMPED)
    y_at = y + rows.to(tl.int64)[:, None] * OUTPUTS + feature[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=is_row & is_feature[None, :])


@triton.jit
def _sum_kernel(
    rows, weights, places, y, width,
    PER_TOKEN: tl.constexpr, ADDS: tl.constexpr, HAS_PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < width
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(PER_TOKEN):
        row = token * PER_TOKEN + place
        weight = tl.load(weights + row)
        if HAS_PLACES:
            row = tl.load(places + row).to(tl.int64)
        total += weight * tl.load(rows + row * width + at, mask=is_in, other=0.0).to(tl.float32)
    y_at = y + token * width + at
    if ADDS:
        total += tl.load(y_at, mask=is_in, other=0.0)
    tl.store(y_at, total.to(y.dtype.element_ty), mask=is_in)


_launch_grouped = Launcher(_grouped_kernel)
_launch_sum = Launcher(_sum_kernel)
