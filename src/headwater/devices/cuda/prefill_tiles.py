"""How a step's prompt chunks are cut for attention: tiles of queries, and pieces of their contexts where tiles are few.

A tile's program goes over its whole context. A few tiles over a long context would leave most of the card idle, so
they are cut into pieces of equal length, as flash decoding does for single tokens
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html). A second kernel joins the partial results. The host, which
knows the lengths, decides all of it and sends two lists to the kernels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_PIECES = 64  # of one tile: a program of the join reads them at once
_MIN_PIECE = 128  # keys
_MIN_SAVED = 384  # keys that the longest tile must save, or the join costs more
_CUT = 64  # pieces begin at multiples of this: whole blocks of keys
_NO_PART = -1

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """The work of the prefill kernel and of the join behind it; a program reads one line.

    A tile whose part is -1 writes its output itself; all others write part number `part`. In both lists, a line of
    zeros is a no-op.
    """

    tiles: Ints  # [M, 5]: row among the chunks, first query of the row, first key, key behind the last, part
    joins: Ints  # [J, 4]: row, first query, first part, number of parts

    @property
    def num_parts(self) -> int:
        return int(self.joins[:, 3].sum())


def plan_tiles(query_lens: Ints, context_lens: Ints, *, num_queries: int, max_pieces: int) -> PrefillTiles:
    """Cut rows into tiles of `num_queries` queries, those with the most keys first: they take longest.

    If tiles are at most half of `max_pieces`, they are cut into at most that many pieces.
    """
    num_tiles = -(-query_lens // num_queries)
    rows = np.repeat(np.arange(len(query_lens), dtype=np.int32), num_tiles)
    ends = np.cumsum(num_tiles)
    starts = (np.arange(len(rows)) - (ends - num_tiles)[rows]) * num_queries
    firsts = (context_lens - query_lens)[rows] + starts  # the last key that every query of the tile sees
    num_keys = np.minimum(firsts + num_queries, context_lens[rows])
    length, counts = _pieces(firsts, num_keys, max_pieces)
    of = np.repeat(np.arange(len(rows)), counts)  # the tile of every piece
    order = np.cumsum(counts) - counts
    number = np.arange(len(of)) - order[of]
    key_starts = number * length
    key_ends = np.where(number == counts[of] - 1, num_keys[of], key_starts + length)
    is_cut = counts > 1
    parts_before = np.cumsum(np.where(is_cut, counts, 0)) - np.where(is_cut, counts, 0)
    parts = np.where(is_cut[of], parts_before[of] + number, _NO_PART)
    tiles = np.stack((rows[of], starts[of], key_starts, key_ends, parts), axis=1).astype(np.int32)
    longest_first = np.argsort(key_starts - key_ends, kind="stable")
    joins = np.stack((rows, starts, parts_before, counts), axis=1)[is_cut].astype(np.int32)
    return PrefillTiles(tiles[longest_first], joins)


def _pieces(firsts: np.ndarray, num_keys: np.ndarray, max_pieces: int) -> tuple[int, np.ndarray]:
    """(keys of a piece, pieces of every tile). Every query of a tile sees a key of each of its pieces."""
    longest = int(num_keys.max(initial=1))
    whole = longest, np.ones(len(num_keys), dtype=np.int64)
    if 2 * len(num_keys) > max_pieces or longest <= _MIN_PIECE + _MIN_SAVED:
        return whole

    def counts_at(length: int) -> np.ndarray:
        return np.minimum(-(-num_keys // length), firsts // length + 1)

    fewest = max(_MIN_PIECE, -(-int(num_keys.sum()) // max_pieces), -(-longest // MAX_PIECES))
    length = -(-fewest // _CUT) * _CUT
    while int(counts_at(length).sum()) > max_pieces:
        length += max(_CUT, length // 16 // _CUT * _CUT)
    return (length, counts_at(length)) if longest - length >= _MIN_SAVED else whole
