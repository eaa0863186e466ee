"""How prompt chunks are cut into tiles of queries and pieces of their contexts, in numbers."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.devices.cuda.prefill_tiles import MAX_PIECES, PrefillTiles, plan_tiles

BLOCK = 64  # what the kernel reads at once: whole blocks but for the last


def _plan(rows: list[tuple[int, int]], *, num_queries: int = 32, max_pieces: int = 1) -> PrefillTiles:
    lens = np.array([queries for queries, _ in rows], dtype=np.int32)
    contexts = np.array([context for _, context in rows], dtype=np.int32)
    return plan_tiles(lens, contexts, num_queries=num_queries, max_pieces=max_pieces)


def test_many_tiles_cover_every_query_once_the_longest_first() -> None:
    plan = _plan([(5, 5), (64, 500), (1, 900), (33, 33)])
    found = sorted((row, first, start, end) for row, first, start, end, _ in plan.tiles.tolist())
    assert found == [(0, 0, 0, 5), (1, 0, 0, 468), (1, 32, 0, 500), (2, 0, 0, 900), (3, 0, 0, 32), (3, 32, 0, 33)]
    assert plan.tiles[0, 0] == 2
    assert set(plan.tiles[:, 4].tolist()) == {-1}
    assert plan.joins.shape == (0, 4)
    assert len(_plan([]).tiles) == 0


def test_few_tiles_over_long_contexts_fill_the_card() -> None:
    """64 queries behind 4,096 tokens in two tiles left all but 16 of an H200's multiprocessors idle."""
    plan = _plan([(64, 4160)], max_pieces=33)
    assert 24 <= len(plan.tiles) <= 33
    assert np.ptp(plan.tiles[:, 3] - plan.tiles[:, 2]) < 320
    assert plan.num_parts == len(plan.tiles)


def test_short_contexts_stay_whole() -> None:
    """A join costs more than it saves."""
    assert len(_plan([(100, 200)], max_pieces=100).joins) == 0


@given(
    rows=st.lists(
        st.tuples(st.integers(1, 300), st.integers(0, 30_000)).map(lambda it: (it[0], it[0] + it[1])), max_size=12
    ),
    num_queries=st.sampled_from([1, 18, 32, 128]),
    max_pieces=st.integers(1, 300),
)
def test_every_key_of_every_tile_is_in_one_piece(
    rows: list[tuple[int, int]], num_queries: int, max_pieces: int
) -> None:
    """A gap or an overlap changes text; a piece of which some query sees nothing makes NaN; parts must not collide."""
    plan = _plan(rows, num_queries=num_queries, max_pieces=max_pieces)
    tiles = [(row, first) for row, (queries, _) in enumerate(rows) for first in range(0, queries, num_queries)]
    joins = {(row, first): (part, num) for row, first, part, num in plan.joins.tolist()}
    pieces: dict[tuple[int, int], list[tuple[int, int, int]]] = {tile: [] for tile in tiles}
    for row, first, start, end, part in plan.tiles.tolist():
        pieces[row, first].append((start, end, part))
    for (row, first), found in pieces.items():
        queries, context = rows[row]
        first_position = context - queries + first
        found.sort()
        assert found[0][0] == 0
        assert found[-1][1] == min(first_position + num_queries, context)
        assert all(before[1] == after[0] for before, after in pairwise(found))
        assert all(start % BLOCK == 0 and start <= first_position and end > start for start, end, _ in found)
        first_part, num_parts = joins.get((row, first), (-1, 1))
        assert [part for *_, part in found] == list(range(first_part, first_part + num_parts))
        assert len(found) <= MAX_PIECES
    assert len(plan.tiles) <= max(max_pieces, len(tiles))
    assert plan.num_parts <= max_pieces
    lengths = plan.tiles[:, 3] - plan.tiles[:, 2]
    assert (np.diff(lengths) <= 0).all()


@pytest.mark.parametrize("max_pieces", [7, 8, 9])
def test_no_more_pieces_than_there_are_places_for(max_pieces: int) -> None:
    """Their scratch memory and the CUDA graphs' lists are of that size."""
    assert len(_plan([(1, 5000), (1, 300), (40, 2000)], max_pieces=max_pieces).tiles) <= max_pieces
