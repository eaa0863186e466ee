"""The rows of a step in tiles of one slot each, planned on the device: a CUDA graph reads the slots when it runs.

After Punica (arXiv 2310.18547). Slots are those of LoRA adapters, or experts. Grids are as large as any slots need:
programs of tiles that these do not need end at once.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.launch import Launcher, alignment

FEW_ROWS = 256
_FEW_TILE, _MANY_TILE = 8, 32  # rows of a tile of adapters
UNSLOTTED = -1  # the slot of tiles of rows whose slot is 0
_BLOCK_ROWS = 256  # that the plan looks at together
_MANY_ROWS, _LARGE_BLOCK_ROWS = 4096, 2048


@dataclass(frozen=True, slots=True, eq=False)
class RowTiles:
    """Tiles of `size` rows that have one slot: `slots` int32[tiles], `rows` int32[tiles, size], -1 for none.

    The slot of a tile that no row needs is 0, that of tiles of rows without a slot UNSLOTTED.
    """

    slots: torch.Tensor
    rows: torch.Tensor
    num_rows: int

    @property
    def size(self) -> int:
        return self.rows.shape[1]


def empty_plan(
    num_rows: int, *, num_slots: int, size: int, device: torch.device, covers_all: bool = False
) -> torch.Tensor:
    """Memory for the slots of tiles of `size` rows, behind their number, which must be set to 0 before `plan_tiles`."""
    num_seen = num_slots if covers_all else num_slots - 1
    num_tiles = num_rows // size + min(num_seen, num_rows)  # each slot may have a tile that is not full
    return torch.empty(1 + num_tiles, dtype=torch.int32, device=device)


def plan_tiles(
    slots: torch.Tensor,
    *,
    num_slots: int,
    size: int | None = None,
    found: torch.Tensor | None = None,
    covers_all: bool = False,
) -> RowTiles:
    """The tiles of a step whose rows have `slots`, int32[T], below `num_slots`; 0 is none.

    `size`: rows of a tile, a power of two; None: what suits adapters. `found`: zeros in the memory of `empty_plan`.
    `covers_all`: rows without a slot have tiles too.
    """
    num_rows, first = len(slots), 0 if covers_all else 1
    size = size or (_FEW_TILE if num_rows <= FEW_ROWS else _MANY_TILE)
    if found is None:
        found = empty_plan(num_rows, num_slots=num_slots, size=size, device=slots.device, covers_all=covers_all).zero_()
    num_tiles = len(found) - 1
    block = _BLOCK_ROWS if num_rows <= _MANY_ROWS else _LARGE_BLOCK_ROWS
    rows = torch.empty((num_tiles, size), dtype=torch.int32, device=slots.device)
    key = (slots.device.index, num_rows == 1, num_rows % 16 == 0, size, block, first, *alignment(slots))
    _launch_plan((num_slots - first,), slots, found, rows, num_rows, size, block, first, key=key)
    return RowTiles(found[1:], rows, num_rows)


@triton.jit
def _plan_kernel(slots, found, rows, num_rows, TILE: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr):
    """A program for each slot: it counts its rows, takes as many tiles as they need, and writes the rows there."""
    own = tl.program_id(0) + FIRST
    at = tl.arange(0, BLOCK)
    count = 0
    for start in range(0, num_rows, BLOCK):
        is_own = tl.load(slots + start + at, mask=start + at < num_rows, other=-1) == own
        count += tl.sum(is_own.to(tl.int32), 0)
    if count == 0:
        return
    num_tiles = (count + TILE - 1) // TILE
    first = tl.atomic_add(found, num_tiles)  # the order of tiles changes no number
    to = rows + first * TILE
    done = 0
    for start in range(0, num_rows, BLOCK):
        is_own = tl.load(slots + start + at, mask=start + at < num_rows, other=-1) == own
        flags = is_own.to(tl.int32)
        tl.store(to + done + tl.cumsum(flags, 0) - 1, start + at, mask=is_own)
        done += tl.sum(flags, 0)
    within = tl.arange(0, TILE)
    tl.store(to + count + within, -1, mask=count + within < num_tiles * TILE)
    for tile in range(num_tiles):
        tl.store(found + 1 + first + tile, tl.where(own == 0, -1, own))


_launch_plan = Launcher(_plan_kernel)
