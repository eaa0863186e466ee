"""Tree, pool and leases against a dict model, under every order of operations Hypothesis finds."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from headwater.cache.invariants import check_invariants
from headwater.cache.lease import TokenSequence
from headwater.cache.namespace import Namespace, Scope
from headwater.cache.page_pool import Owner
from headwater.cache.prefix_cache import PrefixCache
from headwater.clock import ManualClock

PAGE = 3
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=20)
SALTS = st.sampled_from(["", "a"])


class CacheMachine(RuleBasedStateMachine):
    """The model: which birth (a number per write) every page in the tree may have.

    A page that a lease reads must carry the tokens of its path, and be younger than every retirement of its
    scope that happened before the lease was acquired.
    """

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(num_pages=12, page_size=PAGE, page_bytes=1, clock=ManualClock(), min_part_tokens=1)
        self.content: dict[int, tuple] = {}  # page -> (namespace, token path, time written)
        self.time = 0
        self.retired: list[tuple[int, Scope]] = []

    @rule(target=leases, tokens=TOKENS, salt=SALTS, no_store=st.booleans())
    def acquire(self, tokens, salt, no_store):
        self.time += 1
        namespace = Namespace(salt, "", "", "w")
        sequence = TokenSequence(np.array(tokens, dtype=np.int32))
        lease = self.cache.acquire(namespace, sequence, max_cached_tokens=len(tokens) - 1, no_store=no_store)
        self.check_pages(lease, namespace, tokens)
        self.cache.find_part(lease, max_cached_tokens=len(tokens) - 1)
        self.check_part(lease, namespace, tokens)
        needed = len(tokens) // PAGE + 1 - lease.num_pages
        if self.cache.extend(lease, needed) is None:
            assert self.cache.num_available < needed
            self.cache.release(lease)
            return (None, None)
        for index in range(lease.num_shared_pages, len(tokens) // PAGE):
            path = tuple(tokens[: (index + 1) * PAGE])
            self.content[int(lease.page_table()[index])] = (namespace, path, self.time)
        return (lease, namespace)

    def check_pages(self, lease, namespace, tokens):
        for index, page in enumerate(lease.page_table().tolist()):
            space, path, written = self.content[page]
            assert space == namespace and path == tuple(tokens[: (index + 1) * PAGE])
            for at, scope in self.retired:
                if at >= written and scope.has_namespace(space):
                    limit = scope.limit_for(np.array(tokens, dtype=np.int32), PAGE)
                    assert limit is None or index < limit, "a retired page was matched"

    def check_part(self, lease, namespace, tokens):
        """The part is the beginning of a page in the tree, which no retirement has covered."""
        if lease.part is None:
            return
        first, num_tokens = lease.num_shared_pages * PAGE, lease.part.num_tokens
        space, path, written = self.content[lease.part.page]
        assert space == namespace and 0 < num_tokens < PAGE and first + num_tokens < len(tokens)
        assert path[: first + num_tokens] == tuple(tokens[: first + num_tokens])
        assert self.cache.pool.owner_of(lease.part.page) is Owner.TREE
        for at, scope in self.retired:
            if at >= written and scope.has_namespace(space):
                limit = scope.limit_for(np.array(path, dtype=np.int32), PAGE)
                assert limit is None or lease.num_shared_pages < limit, "a part of a retired page was found"

    @rule(pair=leases, share=st.floats(0, 1))
    def publish(self, pair, share):
        lease, _ = pair
        if lease is not None and not lease.is_released:
            self.cache.publish(lease, int(len(lease.tokens) * share))

    @rule(pair=leases)
    def settle(self, pair):
        if pair[0] is not None and not pair[0].is_released:
            self.cache.settle(pair[0])

    @rule(pair=leases, token=st.integers(0, 2))
    def generate(self, pair, token):
        """A decoded token; its page is private, so its content is written now."""
        lease, namespace = pair
        if lease is None or lease.is_released:
            return
        if (len(lease.tokens) + 1) // PAGE + 1 > lease.num_pages and self.cache.extend(lease, 1) is None:
            return
        self.time += 1
        lease.tokens.append(token)
        length = len(lease.tokens)
        if length % PAGE == 0:
            path = tuple(lease.tokens.view().tolist())
            page = int(lease.page_table()[length // PAGE - 1])
            # The page was begun when its first token came: that is the time that counts.
            self.content[page] = (namespace, path, self.time - PAGE)

    @rule(pair=consumes(leases))
    def release(self, pair):
        if pair[0] is not None and not pair[0].is_released:
            self.cache.release(pair[0])

    @rule(salt=st.none() | SALTS, prefix=st.none() | TOKENS)
    def retire(self, salt, prefix):
        ids = None if prefix is None else np.array(prefix, dtype=np.int32)
        scope = Scope(cache_salt=salt, prefix=ids)
        would = self.cache.preview(scope)
        did = self.cache.retire(scope)
        assert (would.freed, would.retired, would.num_leases) == (did.freed, did.retired, did.num_leases)
        self.retired.append((self.time, scope))
        self.time += 1

    @invariant()
    def books_are_right(self):
        check_invariants(self.cache)


CacheMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestCache = CacheMachine.TestCase
