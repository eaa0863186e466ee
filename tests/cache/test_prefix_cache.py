"""Leases, publishing, eviction and retirement, each rule with the failure it prevents."""

import numpy as np
import pytest

from headwater.cache.invariants import check_invariants
from headwater.cache.lease import Lease, TokenSequence
from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.page_pool import Owner, OwnershipError
from headwater.cache.prefix_cache import PrefixCache
from headwater.clock import ManualClock

PAGE = 4
NS = Namespace("", "", "", "w")


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(num_pages=32, page_size=PAGE, page_bytes=64, clock=ManualClock())


def start(cache: PrefixCache, tokens, namespace: Namespace = NS, *, no_store: bool = False) -> Lease:
    """A lease on what is cached of `tokens`, with private pages for the rest."""
    sequence = TokenSequence(ids(*tokens))
    lease = cache.acquire(namespace, sequence, max_cached_tokens=len(sequence), no_store=no_store)
    assert cache.extend(lease, -(-len(sequence) // PAGE) - lease.num_pages) is not None
    check_invariants(cache)
    return lease


def run(cache: PrefixCache, tokens, namespace: Namespace = NS) -> int:
    """A whole request; returns how many of its tokens were cached."""
    lease = start(cache, tokens, namespace)
    cached = lease.num_matched_pages * PAGE
    cache.publish(lease, len(lease.tokens))
    cache.release(lease)
    check_invariants(cache)
    return cached


def test_published_pages_are_found_again(cache):
    assert run(cache, range(10)) == 0
    assert run(cache, range(12)) == 8


def test_a_lease_is_released_exactly_once(cache):
    lease = start(cache, range(8))
    cache.release(lease)
    with pytest.raises(AssertionError, match="exactly once"):
        cache.release(lease)


def test_two_requests_that_compute_the_same_end_up_on_the_same_pages(cache):
    first, second = start(cache, range(12)), start(cache, range(12))
    cache.publish(first, 12)
    changes = cache.publish(second, 12)
    assert [(at, pages.tolist()) for at, pages in changes] == [(0, first.page_table().tolist())]
    assert second.page_table().tolist() == first.page_table().tolist()
    assert cache.pool.count(Owner.PRIVATE) == 3  # its own copies: a step may still read them
    cache.settle(second)
    assert cache.pool.count(Owner.PRIVATE) == 0
    cache.release(first)
    cache.release(second)
    check_invariants(cache)
    assert cache.tier_pages[Tier.DEVICE].num_evictable == 3


def test_a_split_under_a_running_lease_keeps_its_pins(cache):
    lease = start(cache, range(12))
    cache.publish(lease, 12)
    other = start(cache, [0, 1, 2, 3, 50, 51, 52, 53])
    assert other.num_matched_pages == 1
    check_invariants(cache)
    cache.release(lease)
    check_invariants(cache)
    cache.release(other)
    check_invariants(cache)


def test_pinned_pages_are_never_evicted(cache):
    pinned = start(cache, range(16))
    cache.publish(pinned, 16)
    for stem in range(100, 900, 100):
        run(cache, range(stem, stem + 40))
    assert cache.peek(NS, ids(*range(16))) == 16
    cache.release(pinned)


def test_extend_says_no_rather_than_taking_what_is_in_use(cache):
    holder = start(cache, range(28 * PAGE))
    other = cache.acquire(NS, TokenSequence(ids(999)), max_cached_tokens=0)
    assert cache.extend(other, 5) is None
    assert cache.extend(other, 4) is not None
    cache.release(holder)
    cache.release(other)
    assert cache.pool.num_free == 32


@pytest.mark.parametrize("is_held", [False, True], ids=["used again", "held until now"])
def test_room_is_made_from_what_was_used_longest_ago(cache, is_held):
    """A prefix is in use until its request ends, and every request uses it anew."""
    texts = [range(stem, stem + 8 * PAGE) for stem in (0, 100, 200)]
    holder = start(cache, texts[0])
    cache.publish(holder, 8 * PAGE)
    if not is_held:
        cache.release(holder)
    for text in texts:
        run(cache, text)
    if is_held:
        cache.release(holder)
    else:
        run(cache, texts[0])
    run(cache, range(300, 300 + 16 * PAGE))  # eight pages are free, it needs sixteen
    assert [cache.peek(NS, ids(*text)) for text in texts] == [8 * PAGE, 0, 8 * PAGE]


def test_a_disabled_cache_never_matches():
    cache = PrefixCache(num_pages=8, page_size=PAGE, page_bytes=1, clock=ManualClock(), is_enabled=False)
    assert run(cache, range(8)) == 0
    assert run(cache, range(8)) == 0


# --- retire ------------------------------------------------------------------------------------------


def test_retire_frees_unpinned_pages_at_once_and_pinned_ones_with_their_last_pin(cache):
    run(cache, range(100, 108))
    lease = start(cache, range(8))
    cache.publish(lease, 8)
    done = cache.retire(Scope())
    assert (done.freed[Tier.DEVICE], done.retired[Tier.DEVICE]) == (2, 2)
    check_invariants(cache)
    assert cache.pool.count(Owner.RETIRED) == 2 and not done.is_drained
    cache.release(lease)
    check_invariants(cache)
    assert cache.pool.num_free == 32 and done.is_drained


def test_nothing_computed_before_a_retirement_is_published_after_it(cache):
    """Rule 2: without the publish limit, a running request would put its old pages back into the tree."""
    lease = start(cache, range(16))
    cache.publish(lease, 8)
    cache.retire(Scope())
    cache.publish(lease, 16)
    cache.release(lease)
    assert cache.peek(NS, ids(*range(16))) == 0
    check_invariants(cache)


def test_unpinning_needs_no_comparison_with_todays_root(cache):
    """Rule 1: the whole tree was replaced while a lease held a path of the old one."""
    lease = start(cache, range(8))
    cache.publish(lease, 8)
    cache.retire(Scope())
    run(cache, range(8))  # a new root, the same tokens
    cache.release(lease)
    check_invariants(cache)
    assert cache.peek(NS, ids(*range(8))) == 8


def test_a_prefix_scope_keeps_the_pages_above_and_the_siblings(cache):
    run(cache, [*range(8), 20, 21, 22, 23])
    run(cache, [*range(8), 30, 31, 32, 33])
    done = cache.retire(Scope(prefix=ids(*range(8), 20)))
    assert done.freed[Tier.DEVICE] == 1
    assert cache.peek(NS, ids(*range(8), 20, 21, 22, 23)) == 8
    assert cache.peek(NS, ids(*range(8), 30, 31, 32, 33)) == 12
    check_invariants(cache)


def test_leases_outside_a_prefix_scope_go_on_publishing(cache):
    inside, outside = start(cache, range(16)), start(cache, range(100, 116))
    for lease in (inside, outside):
        cache.publish(lease, 8)
    cache.retire(Scope(prefix=ids(*range(5))))
    for lease in (inside, outside):
        cache.publish(lease, 16)
        cache.release(lease)
    assert cache.peek(NS, ids(*range(16))) == 4  # the page above the scope stays
    assert cache.peek(NS, ids(*range(100, 116))) == 16
    check_invariants(cache)


def test_a_lease_that_has_only_begun_the_scopes_page_does_not_publish_it(cache):
    """Its tokens are still shorter than the prefix, but what it wrote in that page is older than the flush."""
    lease = start(cache, range(6))
    cache.retire(Scope(prefix=ids(*range(8))))
    for token in (6, 7):
        lease.tokens.append(token)
    cache.publish(lease, 8)
    cache.release(lease)
    assert cache.peek(NS, ids(*range(8))) == 4


def test_a_lease_that_parts_from_the_prefix_is_not_limited(cache):
    lease = start(cache, [*range(6), 77, 78])
    cache.retire(Scope(prefix=ids(*range(8))))
    cache.publish(lease, 8)
    cache.release(lease)
    assert cache.peek(NS, ids(*range(6), 77, 78)) == 8


def test_scopes_by_salt_and_key_leave_the_rest(cache):
    spaces = [Namespace(salt, key, "", "w") for salt in ("", "a") for key in ("", "k")]
    for space in spaces:
        run(cache, range(8), space)
    cache.retire(Scope(cache_salt="a"))
    assert [cache.peek(space, ids(*range(8))) for space in spaces] == [8, 8, 0, 0]
    cache.retire(Scope(extra_key="k"))
    assert [cache.peek(space, ids(*range(8))) for space in spaces] == [8, 0, 0, 0]
    cache.retire(Scope(cache_salt=""))  # an empty salt is a salt
    assert cache.pool.num_free == 32


def test_flushing_an_empty_scope_is_a_no_op(cache):
    run(cache, range(8))
    before = cache.generation
    assert cache.retire(Scope(cache_salt="nobody")).generation == before
    assert cache.retire(Scope()).generation == before + 1
    assert cache.retire(Scope()).generation == before + 1


def test_preview_counts_the_requests_that_the_scope_names(cache):
    leases = [start(cache, range(8)), start(cache, range(8), Namespace("a", "", "", "w"))]
    would = cache.preview(Scope(cache_salt="a"))
    assert would.num_leases == 1 == cache.retire(Scope(cache_salt="a")).num_leases
    for lease in leases:
        cache.release(lease)


def test_preview_says_what_retire_then_does(cache):
    run(cache, [*range(8), 20, 21, 22, 23])
    lease = start(cache, [*range(8), 30, 31, 32, 33])
    cache.publish(lease, 12)
    scopes = [
        Scope(prefix=ids(*range(8), 20)),
        Scope(prefix=ids(0, 1, 2, 3, 4)),
        Scope(cache_salt="x"),
        Scope(),
    ]
    for scope in scopes:
        would, did = cache.preview(scope), None
        again = cache.preview(scope)
        assert (would.freed, would.retired) == (again.freed, again.retired)
        did = cache.retire(scope)
        assert (would.freed, would.retired) == (did.freed, did.retired)
    cache.release(lease)
    check_invariants(cache)


def test_a_retirement_is_drained_when_the_last_old_lease_ends_even_if_it_shared_nothing(cache):
    lease = start(cache, range(8))
    done = cache.retire(Scope())
    assert not done.is_drained
    cache.release(lease)
    assert done.is_drained


def test_the_pool_notices_a_page_that_is_freed_behind_the_trees_back(cache):
    lease = start(cache, range(4))
    with pytest.raises(OwnershipError):
        cache.pool.free(lease.private[:1], giver=Owner.TREE)


def test_the_version_grows_whenever_peek_finds_something_else(cache):
    """A queue that orders by cached prefixes looks again only then: what it missed would be served out of order."""
    prompt, seen = ids(*range(12)), set()

    def look(num_tokens: int) -> None:
        assert cache.peek(NS, prompt) == num_tokens
        assert cache.version not in seen
        seen.add(cache.version)

    look(0)
    run(cache, range(8))
    look(8)
    run(cache, range(12))
    look(12)
    run(cache, range(100, 100 + 30 * PAGE))  # evicts from the end
    look(8)
    cache.retire(Scope())
    look(0)
