"""Products with LoRA adapters, each row with its own: grouped shrink (x A^T) and expand (y += scale * s B^T).

After Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285). A program takes a tile of rows and goes through the
adapters that its rows have, so rows need not be sorted, and a CUDA graph reads the slots when it runs. Tiles without
adapters end at once. Sums go by pieces of the inputs, in one order, so a row's bits do not depend on its tile.
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
_FEW_ROWS = 256  # up to so many rows, pieces of the inputs are summed by programs of their own
_PIECE = 512  # inputs that are summed by themselves
_BLOCK_INPUTS = 64
BLOCK_OUTPUTS = 128


@dataclass(frozen=True, slots=True, eq=False)
class SiteMatrices:
    """The adapters of all slots at one site of a layer, as the kernels read them. Slot 0 is never read.

    `a` is [slots, projections, rank, in], `b` [slots, outputs of all projections, rank], `scales` float32[slots,
    projections]. `blocks` are the blocks of outputs, int32[blocks, 3]: projection, first output, end.
    """

    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor
    blocks: torch.Tensor


def add_adapters(x: torch.Tensor, y: torch.Tensor, slots: torch.Tensor, site: SiteMatrices) -> None:
    """y += the products of x with the adapter of each row. x [T, in], y [T, outputs], slots int32[T]; 0 is none."""
    num_rows, num_in = x.shape
    if not num_rows:
        return
    _, num_projections, rank, _ = site.a.shape
    num_pieces = triton.cdiv(num_in, _PIECE)
    is_few = num_rows <= _FEW_ROWS
    num_parts, pieces_each = (num_pieces, 1) if is_few else (1, num_pieces)
    tile = 16 if is_few else 64
    s = torch.empty((num_parts, num_rows, num_projections * rank), dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(num_rows, tile)
    shape = (num_in, num_projections, rank, pieces_each, tile)
    key = (x.device.index, x.dtype, site.a.dtype, num_rows == 1, num_rows % 16 == 0, *shape, *alignment(x, slots))
    _launch_shrink(
        (tiles, num_projections, num_parts), x, slots, site.a, s, num_rows, *shape, _PIECE, _BLOCK_INPUTS, key=key
    )
    num_out = site.b.shape[1]
    shape = (num_out, num_projections, rank, num_parts, tile)
    key = (y.device.index, y.dtype, site.b.dtype, num_rows == 1, num_rows % 16 == 0, *shape, *alignment(y, slots))
    _launch_expand(
        (tiles, len(site.blocks)), y, slots, site.b, site.scales, site.blocks, s, num_rows, *shape, BLOCK_OUTPUTS,
        key=key,
    )  # fmt: skip


@triton.jit
def _shrink_kernel(
    x, slots, a, s, num_rows,
    INPUTS: tl.constexpr, PROJECTIONS: tl.constexpr, RANK: tl.constexpr, PIECES: tl.constexpr, TILE: tl.constexpr,
    PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    projection, part = tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + rows, mask=rows < num_rows, other=0)
    current = tl.max(slot, 0)
    ranks, inputs = tl.arange(0, RANK), tl.arange(0, BLOCK)
    x_rows = x + rows.to(tl.int64)[:, None] * INPUTS
    total = tl.zeros((TILE, RANK), dtype=tl.float32)
    if current == 0:
        return
    while current > 0:
        is_own = slot == current
        matrix = a + (current.to(tl.int64) * PROJECTIONS + projection) * RANK * INPUTS
        found = tl.zeros((TILE, RANK), dtype=tl.float32)
        for piece in range(PIECES):
            first = (part * PIECES + piece) * PIECE
            sums = tl.zeros((TILE, RANK), dtype=tl.float32)
            for start in range(0, PIECE, BLOCK):
                at = first + start + inputs
                is_in = at < INPUTS
                values = tl.load(x_rows + at[None, :], mask=is_own[:, None] & is_in[None, :], other=0.0)
                weights = tl.load(matrix + ranks[:, None] * INPUTS + at[None, :], mask=is_in[None, :], other=0.0)
                sums = tl.dot(values, tl.trans(weights), sums, input_precision="ieee")
            found += sums
        total = tl.where(is_own[:, None], found, total)
        current = tl.max(tl.where(slot < current, slot, 0), 0)
    width: tl.constexpr = PROJECTIONS * RANK
    to = s + (part.to(tl.int64) * num_rows + rows[:, None]) * width + projection * RANK + ranks[None, :]
    tl.store(to, total, mask=(slot > 0)[:, None])


@triton.jit
def _expand_kernel(
    y, slots, b, scales, blocks, s, num_rows,
    OUTPUTS: tl.constexpr, PROJECTIONS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(slots + rows, mask=rows < num_rows, other=0)
    current = tl.max(slot, 0)
    if current == 0:
        return
    block = tl.program_id(1)
    projection = tl.load(blocks + 3 * block)
    columns = tl.load(blocks + 3 * block + 1) + tl.arange(0, BLOCK)
    is_in = columns < tl.load(blocks + 3 * block + 2)
    ranks = tl.arange(0, RANK)
    width: tl.constexpr = PROJECTIONS * RANK
    total = tl.zeros((TILE, BLOCK), dtype=tl.float32)
    while current > 0:
        is_own = slot == current
        inner = tl.zeros((TILE, RANK), dtype=tl.float32)
        for part in range(PARTS):
            at = (part * num_rows + rows.to(tl.int64)[:, None]) * width + projection * RANK + ranks[None, :]
            inner += tl.load(s + at, mask=is_own[:, None], other=0.0)
        matrix = b + current.to(tl.int64) * OUTPUTS * RANK
        weights = tl.load(
            matrix + columns[:, None] * RANK + ranks[None, :], mask=is_in[:, None], other=0.0
        ).to(tl.float32)
        precision: tl.constexpr = "ieee" if b.dtype.element_ty == tl.float32 else "tf32x3"
        product = tl.dot(inner, tl.trans(weights), input_precision=precision)
        scale = tl.load(scales + current * PROJECTIONS + projection)
        total = tl.where(is_own[:, None], product * scale, total)
        current = tl.max(tl.where(slot < current, slot, 0), 0)
    to = y + rows.to(tl.int64)[:, None] * OUTPUTS + columns[None, :]
    mask = (slot > 0)[:, None] & is_in[None, :]
    value = tl.load(to, mask=mask, other=0.0).to(tl.float32) + total
    tl.store(to, value.to(y.dtype.element_ty), mask=mask)


_launch_shrink = Launcher(_shrink_kernel)
_launch_expand = Launcher(_expand_kernel)
