"""Products with LoRA adapters, each row with its own: grouped shrink (x A^T) and expand (y += scale * s B^T).

After Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285), over tiles of rows of one adapter (row_tiles.py). Rows
are the short side of the products in tensor cores, since few have one adapter. Few rows are a matter of latency: a
program is short, reads all that it needs at once, and sums over many inputs are shared by many programs. The expand
adds their sums in one order, so the order in which programs run changes no bit. The expand of gate and up multiplies
them too.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.cuda.kernels.layers import activated
from headwater.devices.cuda.kernels.row_tiles import FEW_ROWS, RowTiles
from headwater.devices.device import Activation

RANKS = 16  # that are computed together: the shortest inner side of a product in tensor cores
BLOCK_OUTPUTS = 128
_PROGRAMS = 208  # of a shrink, at about as many as run at once
_FEW_PART, _FEW_INPUTS = 512, 256  # inputs of a program, and those that it reads together
_MANY_PART, _MANY_INPUTS = 256, 128  # the least
_MOST_PARTS = 32  # that the inputs are cut into; the expand adds their sums in every one of its programs
_CHUNK = 8  # parts that are loaded together
_FLOAT32_INPUTS = 32  # without tensor cores: a larger block is unrolled for minutes
_FEW_GATED, _FEW_GATED_WARPS = 256, 8  # outputs of a program that multiplies gate and up
_MANY_GATED, _MANY_GATED_WARPS = 128, 4


@dataclass(frozen=True, slots=True, eq=False)
class SiteMatrices:
    """The adapters of all slots at one site of a layer, as the kernels read them.

    `a` is [slots, projections, rank, in], `b` [slots, outputs of all projections, rank], `scales` float32[slots,
    projections], `ranks` int32[slots, projections]: behind a slot's own rank are zeros. `blocks` are the blocks of
    outputs, int32[blocks, 3]: projection, first output, end. All bounds are multiples of `multiple`.
    """

    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor
    ranks: torch.Tensor
    blocks: torch.Tensor
    multiple: int


def shrink(x: torch.Tensor, tiles: RowTiles, site: SiteMatrices) -> torch.Tensor:
    """x A^T of the rows of the tiles, in parts of the inputs. [T, in] -> float32[parts, tiles, all ranks, size]"""
    _, num_projections, rank, num_in = site.a.shape
    is_few = tiles.num_rows <= FEW_ROWS
    least, block = (_FEW_PART, _FEW_INPUTS) if is_few else (_MANY_PART, _MANY_INPUTS)
    block = _FLOAT32_INPUTS if site.a.dtype == torch.float32 else block
    num_parts = _MOST_PARTS if is_few else min(_MOST_PARTS, max(1, _PROGRAMS // len(tiles.rows)))
    part = triton.cdiv(triton.cdiv(num_in, least), num_parts) * least
    s = _empty_sums(triton.cdiv(num_in, part), tiles, site)
    num_parts, num_tiles = s.shape[:2]
    padded = triton.next_power_of_2(num_projections)
    shape = (num_in, num_projections, padded, rank, part, block, tiles.size, RANKS)
    key = (x.device.index, x.dtype, site.a.dtype, num_tiles == 1, num_tiles % 16 == 0, *shape)
    key += alignment(x, tiles.slots, tiles.rows)
    _launch_shrink(
        (num_tiles, rank // RANKS, num_parts),
        x, tiles.slots, tiles.rows, site.a, site.ranks, s, num_tiles, *shape,
        key=key,
    )  # fmt: skip
    return s


def expand(s: torch.Tensor, y: torch.Tensor, tiles: RowTiles, site: SiteMatrices) -> None:
    """y += scale * s B^T, of [T, outputs]."""
    num_parts, num_tiles = s.shape[:2]
    _, num_projections, rank, _ = site.a.shape
    parts = num_parts, math.gcd(num_parts, _CHUNK)
    shape = (site.b.shape[1], num_projections, rank, *parts, tiles.size, BLOCK_OUTPUTS, RANKS, site.multiple)
    key = (y.device.index, y.dtype, site.b.dtype, num_tiles == 1, num_tiles % 16 == 0, *shape)
    key += alignment(y, tiles.slots, tiles.rows)
    _launch_expand(
        (num_tiles, len(site.blocks)),
        y, tiles.slots, tiles.rows, site.b, site.scales, site.ranks, site.blocks, s, num_tiles, *shape,
        key=key, num_stages=1,
    )  # fmt: skip


def expand_gated(
    s: torch.Tensor, halves: torch.Tensor, tiles: RowTiles, site: SiteMatrices, *, activation: Activation
) -> torch.Tensor:
    """activation(gate) * up of `halves` [T, 2 n] with their adapters added: [T, n]. The tiles cover all rows."""
    num_tiles, is_few = len(tiles.rows), tiles.num_rows <= FEW_ROWS
    num_out, rank = halves.shape[1] // 2, site.a.shape[2]
    out = torch.empty((len(halves), num_out), dtype=halves.dtype, device=halves.device)
    block, num_warps = (_FEW_GATED, _FEW_GATED_WARPS) if is_few else (_MANY_GATED, _MANY_GATED_WARPS)
    parts = len(s), math.gcd(len(s), _CHUNK)
    shape = (num_out, rank, *parts, tiles.size, block, RANKS, activation == "gelu_tanh")
    key = (halves.device.index, halves.dtype, site.b.dtype, num_tiles == 1, num_tiles % 16 == 0, *shape)
    key += alignment(halves, tiles.slots, tiles.rows)
    _launch_gated(
        (num_tiles, triton.cdiv(num_out, block)),
        halves, out, tiles.slots, tiles.rows, site.b, site.scales, site.ranks, s, num_tiles, *shape,
        key=key, num_warps=num_warps, num_stages=1,
    )  # fmt: skip
    return out


def _empty_sums(num_parts: int, tiles: RowTiles, site: SiteMatrices) -> torch.Tensor:
    _, num_projections, rank, _ = site.a.shape
    shape = (num_parts, len(tiles.rows), num_projections * rank, tiles.size)
    return torch.empty(shape, dtype=torch.float32, device=site.a.device)


@triton.jit
def _shrink_kernel(
    x, tile_slots, tile_rows, a, all_ranks, s, num_tiles,
    INPUTS: tl.constexpr, PROJECTIONS: tl.constexpr, PADDED: tl.constexpr, RANK: tl.constexpr, PART: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """A program has a tile, RANKS ranks of every projection, and a part of the inputs."""
    tile, part = tl.program_id(0), tl.program_id(2)
    slot = tl.load(tile_slots + tile)
    rows = tl.load(tile_rows + tile * TILE + tl.arange(0, TILE))
    if slot <= 0:
        return
    each, inputs = tl.arange(0, PADDED * RANKS), part * PART + tl.arange(0, BLOCK)
    first_rank = tl.program_id(1) * RANKS
    rank = each // RANKS * RANK + first_rank + each % RANKS  # among those of all projections
    is_rank = each < PROJECTIONS * RANKS
    if RANK > RANKS:  # no adapter's ranks may be here
        own = tl.load(all_ranks + slot * PROJECTIONS + each // RANKS, mask=is_rank, other=0)
        if first_rank > 0 and tl.max(own, 0) <= first_rank:
            return
    matrix = a + slot.to(tl.int64) * (PROJECTIONS * RANK * INPUTS) + rank[:, None] * INPUTS
    x_rows = x + rows.to(tl.int64)[None, :] * INPUTS
    is_row = (rows >= 0)[None, :]
    if PART == BLOCK:
        weights = tl.load(matrix + inputs[None, :], mask=is_rank[:, None] & (inputs < INPUTS)[None, :], other=0.0)
        values = tl.load(x_rows + inputs[:, None], mask=is_row & (inputs < INPUTS)[:, None], other=0.0)
        sums = tl.dot(weights, values, input_precision="ieee")
    else:
        sums = tl.zeros((PADDED * RANKS, TILE), dtype=tl.float32)
        for start in range(0, PART, BLOCK):
            at = start + inputs
            weights = tl.load(matrix + at[None, :], mask=is_rank[:, None] & (at < INPUTS)[None, :], other=0.0)
            values = tl.load(x_rows + at[:, None], mask=is_row & (at < INPUTS)[:, None], other=0.0)
            sums = tl.dot(weights, values, sums, input_precision="ieee")
    to = s + (part.to(tl.int64) * num_tiles + tile) * (PROJECTIONS * RANK * TILE)
    tl.store(to + rank[:, None] * TILE + tl.arange(0, TILE)[None, :], sums, mask=is_rank[:, None])


@triton.jit
def _add_ranks(total, weights, s_at, part_stride, PARTS: tl.constexpr, CHUNK: tl.constexpr):
    """total + B s of some ranks, s being the sum of parts: B [outputs, ranks], at `s_at` [CHUNK parts, ranks, tile]."""
    sums = tl.load(s_at)
    for chunk in tl.static_range(1, PARTS // CHUNK):  # unrolled, so that the loads wait together
        sums += tl.load(s_at + chunk * CHUNK * part_stride)
    inner = tl.sum(sums, 0)
    if weights.dtype == tl.bfloat16:  # two products of 8 bits each have 16 bits of s
        high = inner.to(tl.bfloat16)
        low = (inner - high.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(weights, low, tl.dot(weights, high, total))
    else:
        precision: tl.constexpr = "ieee" if weights.dtype == tl.float32 else "tf32x3"
        total = tl.dot(weights.to(tl.float32), inner, total, input_precision=precision)
    return total


@triton.jit
def _product(
    weights, b_at, is_in, s, part_stride, rank_at,
    TILE: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """B s of a block of outputs and a tile, [BLOCK, TILE]. `weights` is B, at `b_at`, of the first ranks.

    Behind an adapter's own rank, at `rank_at`, are zeros, and no more than RANKS of them are computed.
    """
    parts = tl.arange(0, CHUNK)[:, None, None]
    s_at = s + parts * part_stride + tl.arange(0, RANKS)[None, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
    total = _add_ranks(tl.zeros((BLOCK, TILE), dtype=tl.float32), weights, s_at, part_stride, PARTS, CHUNK)
    if RANK > RANKS:
        for first in range(RANKS, tl.load(rank_at), RANKS):
            more = tl.load(b_at + first, mask=is_in[:, None], other=0.0)
            total = _add_ranks(total, more, s_at + first * TILE, part_stride, PARTS, CHUNK)
    return total


@triton.jit
def _expand_kernel(
    y, tile_slots, tile_rows, b, scales, all_ranks, blocks, s, num_tiles,
    OUTPUTS: tl.constexpr, PROJECTIONS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, MULTIPLE: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    slot = tl.load(tile_slots + tile)
    rows = tl.load(tile_rows + tile * TILE + tl.arange(0, TILE))
    projection = tl.load(blocks + 3 * block)
    columns = tl.multiple_of(tl.load(blocks + 3 * block + 1), MULTIPLE) + tl.arange(0, BLOCK)
    is_in = columns < tl.multiple_of(tl.load(blocks + 3 * block + 2), MULTIPLE)
    if slot <= 0:
        return
    b_at = b + slot.to(tl.int64) * (OUTPUTS * RANK) + columns[:, None] * RANK + tl.arange(0, RANKS)[None, :]
    weights = tl.load(b_at, mask=is_in[:, None], other=0.0)
    of_projection = slot * PROJECTIONS + projection
    scale = tl.load(scales + of_projection)
    to = y + rows.to(tl.int64)[None, :] * OUTPUTS + columns[:, None]
    mask = (rows >= 0)[None, :] & is_in[:, None]
    old = tl.load(to, mask=mask, other=0.0).to(tl.float32)
    width: tl.constexpr = PROJECTIONS * RANK
    own_s, stride = s + (tile * width + projection * RANK) * TILE, num_tiles * width * TILE
    added = _product(
        weights, b_at, is_in, own_s, stride, all_ranks + of_projection, TILE, BLOCK, RANK, PARTS, CHUNK, RANKS
    )
    tl.store(to, (old + added * scale).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gated_kernel(
    halves, out, tile_slots, tile_rows, b, scales, all_ranks, s, num_tiles,
    OUTPUTS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, RANKS: tl.constexpr, IS_GELU: tl.constexpr,
):  # fmt: skip
    tile, block = tl.program_id(0), tl.program_id(1)
    slot = tl.load(tile_slots + tile)
    rows = tl.load(tile_rows + tile * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    if slot == 0:
        return
    columns = block * BLOCK + tl.arange(0, BLOCK)
    is_in = columns < OUTPUTS
    ranks = tl.arange(0, RANKS)
    own_slot = tl.maximum(slot, 0).to(tl.int64)
    gate_b = b + own_slot * (2 * OUTPUTS * RANK) + columns[:, None] * RANK + ranks[None, :]
    gate_weights = tl.load(gate_b, mask=is_in[:, None], other=0.0)
    up_weights = tl.load(gate_b + OUTPUTS * RANK, mask=is_in[:, None], other=0.0)
    mask = (rows >= 0) & is_in[:, None]
    at = halves + rows * (2 * OUTPUTS) + columns[:, None]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + OUTPUTS, mask=mask, other=0.0).to(tl.float32)
    if slot > 0:
        own_s, stride = s + tile * (2 * RANK * TILE), num_tiles * (2 * RANK * TILE)
        added = _product(
            gate_weights, gate_b, is_in, own_s, stride, all_ranks + slot * 2,
            TILE, BLOCK, RANK, PARTS, CHUNK, RANKS,
        )  # fmt: skip
        gate += added * tl.load(scales + slot * 2)
        added = _product(
            up_weights, gate_b + OUTPUTS * RANK, is_in, own_s + RANK * TILE, stride, all_ranks + slot * 2 + 1,
            TILE, BLOCK, RANK, PARTS, CHUNK, RANKS,
        )  # fmt: skip
        up += added * tl.load(scales + slot * 2 + 1)
    value = (activated(gate, IS_GELU) * up).to(out.dtype.element_ty)
    tl.store(out + rows * OUTPUTS + columns[:, None], value, mask=mask)


_launch_shrink = Launcher(_shrink_kernel)
_launch_expand = Launcher(_expand_kernel)
_launch_gated = Launcher(_gated_kernel)
