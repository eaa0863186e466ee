"""The rows of a step that have adapters, in tiles of one adapter each."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headwater.devices.adapters import NO_ADAPTER
from headwater.devices.cpu.program import NO_ROWS, NO_TILES

TILE_ROWS = 16  # that a thread computes at once; they read an adapter's matrices from its cache


class AdapterTiles(NamedTuple):
    """`adapter_rows` and `adapter_tiles` of a step (kernels/step.h)."""

    rows: npt.NDArray[np.int32]
    tiles: npt.NDArray[np.int32]  # [tiles, 3]: slot, first of `rows`, number of rows


NO_ADAPTERS = AdapterTiles(NO_ROWS, NO_TILES)


def adapter_tiles(slots: npt.NDArray[np.int32]) -> AdapterTiles:
    """The tiles of a step whose tokens have the adapters of these slots. [T]"""
    adapted = np.flatnonzero(slots != NO_ADAPTER).astype(np.int32)
    if not len(adapted):
        return NO_ADAPTERS
    rows = adapted[np.argsort(slots[adapted], kind="stable")]
    of_rows = slots[rows]
    starts = np.flatnonzero(np.diff(of_rows, prepend=NO_ADAPTER))
    tiles = [
        (slot, at, min(TILE_ROWS, end - at))
        for slot, start, end in zip(of_rows[starts], starts, [*starts[1:], len(rows)], strict=True)
        for at in range(start, end, TILE_ROWS)
    ]
    return AdapterTiles(np.ascontiguousarray(rows), np.array(tiles, dtype=np.int32))
