"""Restores over ranks whose pages steps may read before their end."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from headwater.cache.copier import EarlyCopyHandle
from headwater.ranks import orders
from headwater.ranks.copier import RanksCopier
from headwater.ranks.plan_codec import Kind

PAGES = np.array([1, 2], dtype=np.int32)


class Arriving:
    has_failed, took_s = False, 0.5

    def __init__(self) -> None:
        self.is_over = self.has_begun = False
        self.near: set[bool] = set()

    def is_done(self) -> bool:
        return self.is_over

    def is_near(self, *, is_alone: bool) -> bool:
        return is_alone in self.near

    def begin_reading(self) -> None:
        self.has_begun = True


class Three:
    """Three ranks: rank 0's copier, and the plan stream to the others."""

    def __init__(self) -> None:
        self.own = Arriving()
        self.kinds: list[int] = []
        self.num_ranks = 3
        self.stream: Any = SimpleNamespace(
            write=lambda kind, body, words: self.kinds.append(kind),
            write_parts=lambda kind, parts, **_: self.kinds.append(kind),
        )

    def restore(self, *_: object) -> Arriving:
        return self.own

    offload = restore

    def near(self, *, is_alone: bool, has_failed: bool = False) -> None:
        self.on_near(orders.Near(copy_id=0, is_alone=is_alone, has_failed=has_failed))  # type: ignore[attr-defined]


def begun() -> tuple[Three, Any]:
    ranks = Three()
    return ranks, RanksCopier(ranks, ranks).restore(PAGES, PAGES)  # type: ignore[arg-type]


def test_a_restore_is_read_when_all_ranks_are_near_and_they_hear_of_it_first() -> None:
    """Steps behind that command wait for the layers on every rank; those before it do not."""
    ranks, copy = begun()
    assert isinstance(copy, EarlyCopyHandle) and not copy.is_readable(is_alone=True)
    ranks.own.near = {True, False}
    ranks.near(is_alone=True)
    ranks.near(is_alone=False)
    assert not copy.is_readable(is_alone=True), "a rank is missing"
    ranks.near(is_alone=True)
    assert not copy.is_readable(is_alone=False)
    assert ranks.kinds == [Kind.RESTORE] and not ranks.own.has_begun
    assert copy.is_readable(is_alone=True)
    assert ranks.kinds == [Kind.RESTORE, Kind.READ_EARLY] and ranks.own.has_begun
    assert copy.is_readable(is_alone=False), "a step may read it already"
    assert len(ranks.kinds) == 2 and not copy.is_done()


def test_a_restore_that_failed_on_one_rank_is_never_read_early() -> None:
    ranks, copy = begun()
    ranks.own.near = {True, False}
    for has_failed in (False, True):
        ranks.near(is_alone=True, has_failed=has_failed)
    assert not copy.is_readable(is_alone=True)


def test_other_copies_have_no_early_readers() -> None:
    ranks = Three()
    assert not isinstance(RanksCopier(ranks, ranks).offload(PAGES, PAGES), EarlyCopyHandle)  # type: ignore[arg-type]
