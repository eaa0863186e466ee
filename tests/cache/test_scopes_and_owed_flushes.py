"""What a scope covers, at its edges, and which store owes which flush."""

import numpy as np
import pytest

from headwater.cache.lease import TokenSequence
from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.retirement import RaisedScope
from headwater.cache.storage.generations import UnacknowledgedFlushes
from headwater.clock import ManualClock

PAGE = 4
NS = Namespace("", "", "", "w")


def ids(num_tokens: int) -> np.ndarray:
    return np.arange(num_tokens, dtype=np.int32)


@pytest.mark.parametrize(
    "narrowed",
    [
        Scope(cache_salt=""),
        Scope(extra_key=""),
        Scope(other_than_weights_id="w"),
        Scope(adapter=""),
        Scope(prefix=ids(1)),
    ],
    ids=["salt", "key", "weights", "adapter", "prefix"],
)
def test_a_scope_with_any_limit_is_not_everything(narrowed: Scope) -> None:
    """The side caches, and the events of a cleared cache, are for a flush of everything."""
    assert not narrowed.is_everything
    assert Scope(tiers=frozenset({Tier.HOST})).is_everything


@pytest.mark.parametrize(("num_tokens", "limit"), [(7, None), (8, None), (9, 2), (10, 2), (20, 2)])
def test_a_sequence_is_in_scope_from_the_first_token_of_the_prefixs_last_page_on(num_tokens: int, limit: int) -> None:
    assert Scope(prefix=ids(10)).limit_for(ids(num_tokens), PAGE) == limit


def test_a_lease_that_ends_before_the_scope_is_not_in_it() -> None:
    """A pin of a prompt of which only the beginning was cached would end with pages that it never had."""
    cache = PrefixCache(num_pages=16, page_size=PAGE, page_bytes=64, clock=ManualClock())
    first = cache.acquire(NS, TokenSequence(ids(8)), max_cached_tokens=8)
    assert cache.extend(first, 2) is not None
    cache.publish(first, 8)
    pinned = cache.acquire(NS, TokenSequence(ids(16)), max_cached_tokens=16, no_store=True)
    assert (pinned.num_pages, cache.retire(Scope(prefix=ids(10))).num_leases) == (2, 0)
    assert cache.preview(Scope(prefix=ids(8))).num_leases == cache.retire(Scope(prefix=ids(8))).num_leases == 2


def flushed(salt: str | None = None, place: str | None = None) -> RaisedScope:
    return RaisedScope(Scope(cache_salt=salt), place=place)


def test_a_flush_without_a_store_is_owed_by_every_store_that_has_been_attached() -> None:
    flushes, raised = UnacknowledgedFlushes(), flushed("a")
    flushes.left_by("one", [])
    flushes.left_by("two", [])
    flushes.add(raised)
    taken = flushes.take("two")
    assert taken[0] is raised and [(each.scope.cache_salt, each.place) for each in taken[1:]] == [("a", "two")]
    assert [(each.scope.cache_salt, each.place) for each in flushes.take("one")] == [("a", "one")]
    assert flushes.take("one") == flushes.take("three") == []


def test_what_a_store_left_undone_is_done_by_the_next_and_by_itself_when_it_returns() -> None:
    flushes, raised = UnacknowledgedFlushes(), flushed("a")
    flushes.left_by("one", [raised])
    assert flushes.take("two") == [raised]
    (own,) = flushes.take("one")
    assert own is not raised and (own.scope.cache_salt, own.place) == ("a", "one")
    flushes.left_by("one", [own])
    assert flushes.take("two") == [], "it was carried out there, and is owed by that store alone"
    assert [each.place for each in flushes.take("one")] == ["one"]
