"""Page ownership: a page that is freed twice, or by a stranger, must stop the process, not corrupt text."""

import numpy as np
import pytest

from headwater.cache.page_pool import Owner, OwnershipError, PagePool


def test_pages_are_handed_out_once():
    pool = PagePool(10)
    first, second = pool.take(4, owner=Owner.PRIVATE), pool.take(6, owner=Owner.PRIVATE)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(10))
    assert pool.take(1, owner=Owner.PRIVATE) is None
    pool.check()


def test_a_take_that_cannot_be_filled_changes_nothing():
    pool = PagePool(3)
    assert pool.take(4, owner=Owner.TREE) is None
    assert pool.num_free == 3


def test_a_double_free_panics():
    pool = PagePool(4)
    pages = pool.take(2, owner=Owner.PRIVATE)
    pool.free(pages, giver=Owner.PRIVATE)
    with pytest.raises(OwnershipError, match="belongs to FREE"):
        pool.free(pages, giver=Owner.PRIVATE)


def test_only_the_owner_may_free_or_hand_over():
    pool = PagePool(4)
    pages = pool.take(2, owner=Owner.TREE)
    with pytest.raises(OwnershipError, match="belongs to TREE"):
        pool.free(pages, giver=Owner.PRIVATE)
    with pytest.raises(OwnershipError):
        pool.hand_over(pages, giver=Owner.RETIRED, taker=Owner.TREE)
    pool.hand_over(pages, giver=Owner.TREE, taker=Owner.RETIRED)
    assert pool.count(Owner.RETIRED) == 2
    pool.free(pages, giver=Owner.RETIRED)
    assert pool.num_free == 4


def test_the_audit_sees_a_corrupted_free_list():
    pool = PagePool(4)
    pool._stack[0] = pool._stack[1]
    with pytest.raises(OwnershipError, match="free list"):
        pool.check()


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="capacity=0"):
        PagePool(0)


def test_freed_pages_are_reused():
    pool = PagePool(2)
    pages = pool.take(2, owner=Owner.PRIVATE)
    pool.free(pages[:1], giver=Owner.PRIVATE)
    assert pool.take(1, owner=Owner.TREE).tolist() == pages[:1].tolist()
    assert np.array_equal(pages, np.array([0, 1]))
