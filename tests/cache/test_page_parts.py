"""Hits that end inside a page: which page is copied, what keeps it there, and what must not be copied."""

import numpy as np
import pytest

from headwater.cache.invariants import check_invariants
from headwater.cache.lease import Lease, TokenSequence
from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.page_pool import Owner
from headwater.cache.prefix_cache import PrefixCache
from headwater.clock import ManualClock

PAGE = 8
NS = Namespace("", "", "", "w")
STEM = list(range(100, 100 + PAGE))


def ids(tokens) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(num_pages=16, page_size=PAGE, page_bytes=64, clock=ManualClock(), min_part_tokens=3)


def fill(cache: PrefixCache, tokens, namespace: Namespace = NS) -> list[int]:
    """Leave the pages of `tokens` in the tree, as a request does; returns them."""
    lease = cache.acquire(namespace, TokenSequence(ids(tokens)), max_cached_tokens=len(tokens))
    assert cache.extend(lease, len(tokens) // PAGE - lease.num_pages) is not None
    cache.publish(lease, len(tokens))
    pages = lease.page_table().tolist()
    cache.release(lease)
    return pages


def seek(cache: PrefixCache, tokens, namespace: Namespace = NS, *, most: int | None = None) -> Lease:
    lease = cache.acquire(namespace, TokenSequence(ids(tokens)), max_cached_tokens=most or len(tokens) - 1)
    cache.find_part(lease, max_cached_tokens=most or len(tokens) - 1)
    check_invariants(cache)
    return lease


def found(lease: Lease) -> tuple[int, int] | None:
    return None if lease.part is None else (lease.part.page, lease.part.num_tokens)


def test_the_page_that_shares_the_most_tokens_is_found(cache):
    fill(cache, [*STEM, 1, 2, 3, 9, 9, 9, 9, 9])
    longest = fill(cache, [*STEM, 1, 2, 3, 4, 5, 9, 9, 9])
    fill(cache, [*STEM, 1, 2, 3, 4, 9, 9, 9, 9])
    lease = seek(cache, [*STEM, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert (lease.num_matched_pages, found(lease)) == (1, (longest[1], 5))


def test_a_page_behind_no_whole_page_is_found(cache):
    pages = fill(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert found(seek(cache, [1, 2, 3, 4, 0, 0, 0, 0, 0, 0])) == (pages[0], 4)


def test_a_page_in_the_middle_of_a_run_is_found(cache):
    pages = fill(cache, [*STEM, *range(1, 1 + 2 * PAGE)])
    assert found(seek(cache, [*STEM, *range(1, 1 + PAGE), 9, 10, 11, 0, 0])) == (pages[2], 3)


def test_the_same_prompt_again_lacks_only_its_last_token(cache):
    prompt = [*STEM, 1, 2, 3, 4, 5, 6, 7, 8]
    pages = fill(cache, prompt)
    assert found(seek(cache, prompt)) == (pages[1], 7)


def test_a_short_part_is_left_alone(cache):
    fill(cache, [*STEM, 1, 2, 0, 0, 0, 0, 0, 0])
    assert found(seek(cache, [*STEM, 1, 2, 3, 4, 5])) is None
    assert found(seek(cache, [*STEM, 1, 2, 0, 0], most=PAGE + 2)) is None, "log-probabilities need the third"


def test_pages_of_one_token_have_no_parts():
    cache = PrefixCache(num_pages=8, page_size=1, page_bytes=8, clock=ManualClock(), min_part_tokens=1)
    lease = cache.acquire(NS, TokenSequence(ids([1, 2])), max_cached_tokens=2)
    cache.extend(lease, 2)
    cache.publish(lease, 2)
    assert found_one(cache, [1, 3, 3]) is None


def found_one(cache: PrefixCache, tokens) -> tuple[int, int] | None:
    lease = cache.acquire(NS, TokenSequence(ids(tokens)), max_cached_tokens=len(tokens) - 1)
    cache.find_part(lease, max_cached_tokens=len(tokens) - 1)
    return found(lease)


@pytest.mark.parametrize("other", [Namespace("salt", "", "", "w"), Namespace("", "", "", "w2")])
def test_another_tenant_and_other_weights_find_nothing(cache, other):
    fill(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert found(seek(cache, [1, 2, 3, 4, 0, 0, 0, 0, 0], other)) is None


def test_a_disabled_cache_finds_nothing():
    cache = PrefixCache(num_pages=4, page_size=PAGE, page_bytes=8, clock=ManualClock(), is_enabled=False)
    assert found_one(cache, [1] * 12) is None


def test_the_page_is_not_evicted_before_its_copy(cache):
    pages = fill(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    lease = seek(cache, [1, 2, 3, 4, *[0] * 12])
    assert cache.extend(lease, 16) is None, "the page would have to go"
    assert cache.extend(lease, 15) is not None
    assert cache.pool.owner_of(pages[0]) is Owner.TREE
    cache.settle(lease)
    check_invariants(cache)
    assert cache.extend(lease, 1) is not None


def test_the_page_survives_a_flush_until_the_step_has_ended(cache):
    """Between the plan and the end of its step the page is retired, not free; and nobody finds it any more."""
    pages = fill(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    lease = seek(cache, [1, 2, 3, 4, *[0] * 12])
    cache.extend(lease, 2)
    retirement = cache.retire(Scope())
    assert cache.pool.owner_of(pages[0]) is Owner.RETIRED and not retirement.is_drained
    other = seek(cache, [1, 2, 3, 4, *[7] * 12])
    assert found(other) is None
    cache.settle(lease)
    assert cache.pool.owner_of(pages[0]) is Owner.FREE
    cache.publish(lease, 16)
    assert cache.peek(NS, ids([1, 2, 3, 4, *[0] * 12])) == 0, "its own page began before the flush"
    cache.release(lease)
    assert retirement.is_drained
    cache.release(other)
    check_invariants(cache)


def test_a_split_of_the_run_meanwhile_keeps_its_pins(cache):
    fill(cache, [*range(1, 1 + 2 * PAGE)])
    lease = seek(cache, [1, 2, 3, 4, *[0] * 12])
    other = seek(cache, [*range(1, 1 + PAGE), *[5] * PAGE])
    assert other.num_matched_pages == 1
    cache.release(lease)
    cache.release(other)
    check_invariants(cache)
    assert cache.tier_pages[Tier.DEVICE].num_evictable == 2


def test_a_page_that_a_restore_still_writes_is_not_copied(cache):
    """A step waits for arriving pages layer by layer, a copy before it would not."""
    fill(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    (child,) = cache.tree.roots[NS].children.values()
    run = child.runs[Tier.DEVICE]
    run.arrival, run.pins = object(), 1
    assert found_one(cache, [1, 2, 3, 4, 0, 0, 0, 0, 0]) is None
    run.arrival = None
    assert found_one(cache, [1, 2, 3, 4, 0, 0, 0, 0, 0]) is not None


def test_kv_from_before_a_flush_of_the_store_does_not_get_into_pages_that_may_be_stored(cache):
    fill(cache, [1, 2, 3, 4, 5, 6, 7, 8])
    (child,) = cache.tree.roots[NS].children.values()
    run = child.runs[Tier.DEVICE]
    lease = cache.acquire(NS, TokenSequence(ids([1, 2, 3, 4, 0, 0])), max_cached_tokens=5)
    cases = (((1,), (2,), False), (None, (1,), False), ((1,), (1,), True), ((1,), None, True))
    for of_page, of_lease, is_found in cases:
        run.generations, lease.generations = of_page, of_lease
        cache.find_part(lease, max_cached_tokens=5)
        assert (lease.part is not None) is is_found
        cache.drop_part(lease)


def test_of_thousands_of_children_only_the_newest_are_compared(cache):
    cache = PrefixCache(num_pages=600, page_size=PAGE, page_bytes=8, clock=ManualClock())
    for number in range(500):
        fill(cache, [1, 2, 3, 4, 5, number, 0, 0])
    assert found_one(cache, [1, 2, 3, 4, 5, 499, 9, 9, 9])[1] == 6
    assert found_one(cache, [1, 2, 3, 4, 5, 0, 9, 9, 9])[1] == 5
