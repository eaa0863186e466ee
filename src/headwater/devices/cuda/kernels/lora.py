"""Products with LoRA adapters, each row with its own: grouped shrink (x A^T) and expand (y += scale * s B^T).

After Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285). Once a step, its rows are put in tiles of one adapter
each (`plan_tiles`), on the device: a CUDA graph reads the slots when it runs. Programs of tiles that are not needed end
at once. Sums go by pieces of the inputs, in one order, so a row's bits do not depend on its tile.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.launch import Launcher, alignment

MIN_RANK = 16  # the smallest side of a product in tensor cores
FEW_ROWS = 256  # of tiles of 16 rows
_PIECE = 512  # inputs that are summed by themselves
_MOST_PARTS = 8  # programs that sum pieces of the inputs; the expand adds their sums in every one of its programs
_GROUPED_BLOCKS = 128  # so many blocks of outputs are enough for programs that compute several
_GROUP = 4
_BLOCK_INPUTS = 128  # read together
_BLOCK_FLOAT32 = 32  # without tensor cores: a larger block is unrolled for minutes
_BLOCK_ROWS = 256  # that the plan of tiles looks at together
_MANY_ROWS, _LARGE_BLOCK_ROWS = 4096, 2048
BLOCK_OUTPUTS = 128


@dataclass(frozen=True, slots=True, eq=False)
class SiteMatrices:
    """The adapters of all slots at one site of a layer, as the kernels read them. Slot 0 is never read.

    `a` is [slots, projections, rank, in], `b` [slots, outputs of all projections, rank], `scales` float32[slots,
    projections], `ranks` int32[slots, projections]: what lies behind a slot's own rank is not read. `blocks` are the
    blocks of outputs, int32[blocks, 3]: projection, first output, end.
    """

    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor
    ranks: torch.Tensor
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RowTiles:
    """Tiles of `size` rows that have one adapter: `slots` int32[tiles], `rows` int32[tiles, size], -1 for none.

    The slot of a tile that no row needs is 0.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    num_rows: int

    @property
    def size(self) -> int:
        return self.rows.shape[1]


def empty_plan(num_rows: int, *, num_slots: int, size: int, device: torch.device) -> torch.Tensor:
    """Memory for the slots of tiles of `size` rows, behind their number, which must be set to 0 before `plan_tiles`."""
    num_tiles = num_rows // size + min(num_slots - 1, num_rows)  # each slot may have a tile that is not full
    return torch.empty(1 + num_tiles, dtype=torch.int32, device=device)


def plan_tiles(
    slots: torch.Tensor, *, num_slots: int, size: int | None = None, found: torch.Tensor | None = None
) -> RowTiles:
    """The tiles of a step whose rows have the adapters of `slots`, int32[T], below `num_slots`; 0 is none.

    `size`: rows of a tile, a power of two; None: what suits adapters. `found`: zeros in the memory of `empty_plan`.
    """
    num_rows = len(slots)
    size = size or (16 if num_rows <= FEW_ROWS else 64)
    if found is None:
        found = empty_plan(num_rows, num_slots=num_slots, size=size, device=slots.device).zero_()
    num_tiles = len(found) - 1
    block = _BLOCK_ROWS if num_rows <= _MANY_ROWS else _LARGE_BLOCK_ROWS
    rows = torch.empty((num_tiles, size), dtype=torch.int32, device=slots.device)
    key = (slots.device.index, num_rows == 1, num_rows % 16 == 0, size, block, *alignment(slots))
    _launch_plan((num_slots - 1,), slots, found, rows, num_rows, size, block, key=key)
    return RowTiles(found[1:], rows, num_rows)


def shrink(x: torch.Tensor, tiles: RowTiles, site: SiteMatrices) -> torch.Tensor:
    """x A^T of the rows of the tiles, in pieces of the inputs. [T, in] -> float32[pieces, tiles, size, all ranks]"""
    s = empty_sums(x, tiles, site)
    shrink_into(s, x, tiles, site)
    return s


def empty_sums(x: torch.Tensor, tiles: RowTiles, site: SiteMatrices) -> torch.Tensor:
    """Memory for what `shrink` returns."""
    _, num_projections, rank, num_in = site.a.shape
    num_parts = min(triton.cdiv(num_in, _PIECE), _MOST_PARTS)
    shape = (num_parts, len(tiles.rows), tiles.size, num_projections * rank)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def shrink_into(s: torch.Tensor, x: torch.Tensor, tiles: RowTiles, site: SiteMatrices) -> None:
    num_in = x.shape[1]
    _, num_projections, rank, _ = site.a.shape
    num_parts, num_tiles = s.shape[:2]
    pieces_each = triton.cdiv(triton.cdiv(num_in, _PIECE), num_parts)
    shape = (num_in, num_projections, rank, pieces_each, tiles.size)
    block = _BLOCK_FLOAT32 if site.a.dtype == torch.float32 else _BLOCK_INPUTS
    key = (x.device.index, x.dtype, site.a.dtype, num_tiles == 1, num_tiles % 16 == 0, *shape)
    key += alignment(x, tiles.slots, tiles.rows)
    _launch_shrink(
        (num_tiles, num_projections, num_parts),
        x, tiles.slots, tiles.rows, site.a, site.ranks, s, num_tiles, *shape, _PIECE, block,
        key=key,
    )  # fmt: skip


def expand(s: torch.Tensor, y: torch.Tensor, tiles: RowTiles, site: SiteMatrices) -> None:
    """y += scale * s B^T, of [T, outputs]."""
    num_parts, num_tiles = s.shape[:2]
    _, num_projections, rank, _ = site.a.shape
    num_blocks = len(site.blocks)
    group = _GROUP if num_blocks >= _GROUPED_BLOCKS and tiles.num_rows <= FEW_ROWS else 1
    shape = (site.b.shape[1], num_projections, rank, num_parts, tiles.size, num_blocks, group)
    key = (y.device.index, y.dtype, site.b.dtype, num_tiles == 1, num_tiles % 16 == 0, *shape)
    key += alignment(y, tiles.slots, tiles.rows)
    _launch_expand(
        (num_tiles, triton.cdiv(num_blocks, group)),
        y, tiles.slots, tiles.rows, site.b, site.scales, site.ranks, site.blocks, s, num_tiles, *shape, BLOCK_OUTPUTS,
        key=key,
    )  # fmt: skip


@triton.jit
def _plan_kernel(slots, found, rows, num_rows, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """A program for each slot: it counts its rows, takes as many tiles as they need, and writes the rows there."""
    own = tl.program_id(0) + 1
    at = tl.arange(0, BLOCK)
    count = 0
    for start in range(0, num_rows, BLOCK):
        is_own = tl.load(slots + start + at, mask=start + at < num_rows, other=0) == own
        count += tl.sum(is_own.to(tl.int32), 0)
    if count == 0:
        return
    num_tiles = (count + TILE - 1) // TILE
    first = tl.atomic_add(found, num_tiles)  # the order of tiles changes no number
    to = rows + first * TILE
    done = 0
    for start in range(0, num_rows, BLOCK):
        is_own = tl.load(slots + start + at, mask=start + at < num_rows, other=0) == own
        flags = is_own.to(tl.int32)
        tl.store(to + done + tl.cumsum(flags, 0) - 1, start + at, mask=is_own)
        done += tl.sum(flags, 0)
    within = tl.arange(0, TILE)
    tl.store(to + count + within, -1, mask=count + within < num_tiles * TILE)
    for tile in range(num_tiles):
        tl.store(found + 1 + first + tile, own)


@triton.jit
def _shrink_kernel(
    x, tile_slots, tile_rows, a, all_ranks, s, num_tiles,
    INPUTS: tl.constexpr, PROJECTIONS: tl.constexpr, RANK: tl.constexpr, PIECES: tl.constexpr, TILE: tl.constexpr,
    PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, projection, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tile_slots + tile).to(tl.int64)
    if slot == 0:
        return
    rank = tl.load(all_ranks + slot * PROJECTIONS + projection)
    if rank == 0:
        return
    own, ranks, inputs = tl.arange(0, TILE), tl.arange(0, RANK), tl.arange(0, BLOCK)
    rows = tl.load(tile_rows + tile * TILE + own)
    x_rows = x + rows.to(tl.int64)[:, None] * INPUTS
    matrix = a + (slot * PROJECTIONS + projection) * RANK * INPUTS + ranks[:, None] * INPUTS
    total = tl.zeros((TILE, RANK), dtype=tl.float32)
    for piece in range(PIECES):
        first = (part * PIECES + piece) * PIECE
        sums = tl.zeros((TILE, RANK), dtype=tl.float32)
        for start in range(0, PIECE, BLOCK):
            at = first + start + inputs
            is_in = at < INPUTS
            values = tl.load(x_rows + at[None, :], mask=(rows >= 0)[:, None] & is_in[None, :], other=0.0)
            weights = tl.load(matrix + at[None, :], mask=(ranks < rank)[:, None] & is_in[None, :], other=0.0)
            sums = tl.dot(values, tl.trans(weights), sums, input_precision="ieee")
        total += sums
    width: tl.constexpr = PROJECTIONS * RANK
    to = s + ((part.to(tl.int64) * num_tiles + tile) * TILE + own[:, None]) * width + projection * RANK + ranks[None, :]
    tl.store(to, total)


@triton.jit
def _expand_kernel(
    y, tile_slots, tile_rows, b, scales, all_ranks, blocks, s, num_tiles,
    OUTPUTS: tl.constexpr, PROJECTIONS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    slot = tl.load(tile_slots + tile).to(tl.int64)
    if slot == 0:
        return
    own, ranks = tl.arange(0, TILE), tl.arange(0, RANK)
    rows = tl.load(tile_rows + tile * TILE + own)
    width: tl.constexpr = PROJECTIONS * RANK
    precision: tl.constexpr = "ieee" if b.dtype.element_ty == tl.float32 else "tf32x3"
    first = tl.program_id(1) * GROUP
    for block in range(first, tl.minimum(first + GROUP, NUM_BLOCKS)):
        projection = tl.load(blocks + 3 * block)
        columns = tl.load(blocks + 3 * block + 1) + tl.arange(0, BLOCK)
        is_in = columns < tl.load(blocks + 3 * block + 2)
        rank = tl.load(all_ranks + slot * PROJECTIONS + projection)
        scale = tl.load(scales + slot * PROJECTIONS + projection)
        if rank > 0:
            weights = tl.load(
                b + slot * OUTPUTS * RANK + columns[:, None] * RANK + ranks[None, :],
                mask=is_in[:, None] & (ranks < rank)[None, :],
                other=0.0,
            ).to(tl.float32)
            to = y + rows.to(tl.int64)[:, None] * OUTPUTS + columns[None, :]
            mask = (rows >= 0)[:, None] & is_in[None, :]
            old = tl.load(to, mask=mask, other=0.0).to(tl.float32)
            at = s + (tile * TILE + own[:, None]) * width + projection * RANK + ranks[None, :]
            inner = tl.zeros((TILE, RANK), dtype=tl.float32)
            for part in tl.static_range(PARTS):  # unrolled, so that the loads wait together
                inner += tl.load(at + part * num_tiles * TILE * width)
            value = old + tl.dot(inner, tl.trans(weights), input_precision=precision) * scale
            tl.store(to, value.to(y.dtype.element_ty), mask=mask)


_launch_plan = Launcher(_plan_kernel)
_launch_shrink = Launcher(_shrink_kernel)
_launch_expand = Launcher(_expand_kernel)
