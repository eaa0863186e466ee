"""Tree, pools, copies and a store against a dict model, under every order of operations Hypothesis finds."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from headwater.cache.host_tier import HostTier
from headwater.cache.invariants import check_invariants
from headwater.cache.lease import Lease
from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.page_pool import Owner, PagePool
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.storage_names import StorageNames
from headwater.cache.storage_tier import StorageSettings, StorageTier
from headwater.cache.token_sequence import TokenSequence
from headwater.cache.write_policy import WritePolicy
from headwater.clock import ManualClock
from headwater.simulation.fake_jobs import FakeJobRunner
from headwater.storage.memory import MemoryBackend
from headwater.storage.page_key import Fingerprint

PAGE = 2
STEMS = ([0] * 13, [0] * 6 + [1] * 7, [1] * 13)  # few, so that what one wrote the others find
TOKENS = st.builds(lambda stem, length: stem[:length], st.sampled_from(STEMS), st.integers(1, 13))
SALTS = st.sampled_from(["", "", "a"])
DEVICE, HOST, STORAGE = Tier.DEVICE, Tier.HOST, Tier.STORAGE
TIERS = st.sampled_from([{DEVICE, HOST}, {DEVICE, HOST}, set(Tier), {STORAGE}, {DEVICE}, {HOST}]).map(frozenset)
FINGERPRINT = Fingerprint(
    weights_id="", model_config_hash="m", kv_dtype="d", page_size=PAGE, num_layers=1, num_kv_heads=1, head_dim=1
)


@dataclass(frozen=True)
class Content:
    """What was computed into a page."""

    namespace: Namespace
    path: tuple[int, ...]
    time: int


class Memory:
    """Pages of one tier: a content's number in each; and since when what is there was on its way."""

    page_bytes = 8

    def __init__(self, num_pages: int) -> None:
        self.content = np.zeros(num_pages, dtype=np.int64)
        self.began = np.zeros(num_pages, dtype=np.int64)
        self.is_from_store = np.zeros(num_pages, dtype=bool)
        self.pool: PagePool | None = None
        self.now: Callable[[], int] = lambda: 0

    def view(self, page: int) -> memoryview:
        if self.pool is not None and self.pool.owner_of(page) is Owner.TRANSFER:  # a prefetch will write it
            self.content[page] = 0
            self.began[page] = self.now()
            self.is_from_store[page] = True
        return memoryview(self.content[page : page + 1].view(np.uint8))


class Copy:
    """Ends when the machine says so; its source must not change before, and nobody else writes its target."""

    took_s = 0.0

    def __init__(self, source: Memory, sources, target: Memory, targets, time: int) -> None:
        self.has_failed = False
        self._is_done = False
        self._source, self._sources, self._target, self._targets = source, sources.copy(), target, targets.copy()
        self._before = source.content[sources].copy()
        target.content[targets] = 0
        target.began[targets] = time
        target.is_from_store[targets] = False

    def end(self, *, fails: bool) -> None:
        assert np.array_equal(self._source.content[self._sources], self._before), "a page was reused while copied"
        assert not self._target.content[self._targets].any(), "somebody wrote to the target of a copy"
        self._target.content[self._targets] = -1 if fails else self._before
        self.has_failed = fails
        self._is_done = True

    def is_done(self) -> bool:
        return self._is_done


class TiersMachine(RuleBasedStateMachine):
    """The model: every page of the tree holds what its path says, and nothing a flush of its tier has covered.

    What a copy brings counts from the moment the copy began; what is read from the store must have been computed
    after every flush of the store before.
    """

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.time = 1
        self.memory = {Tier.DEVICE: Memory(12), Tier.HOST: Memory(14)}
        self.contents: list[Content | None] = [None]  # by number
        self.copies: list[Copy] = []
        self.retired: list[tuple[int, Scope]] = []
        self.given: set[Lease] = set()
        self.clock, self.jobs = ManualClock(), FakeJobRunner()
        self.jobs.max_polls = 3
        self.cache = PrefixCache(
            num_pages=12,
            page_size=PAGE,
            page_bytes=8,
            clock=self.clock,
            host=HostTier(
                num_pages=14,
                copier=self,
                pages=self.memory[Tier.HOST],
                policy=WritePolicy.WRITE_THROUGH,
                max_pages_in_flight=20,
                min_restore_tokens=1,
            ),
        )
        self.memory[Tier.HOST].pool = self.cache.books[Tier.HOST].pool
        self.memory[Tier.HOST].now = lambda: self.time
        self.backend = MemoryBackend(capacity_bytes=1 << 20)
        self.attach()

    # --- the copier ---------------------------------------------------------------------------------

    def offload(self, device_pages, host_pages) -> Copy:
        return self._copy(Tier.DEVICE, device_pages, Tier.HOST, host_pages)

    def restore(self, host_pages, device_pages) -> Copy:
        return self._copy(Tier.HOST, host_pages, Tier.DEVICE, device_pages)

    def _copy(self, source: Tier, sources, target: Tier, targets) -> Copy:
        copy = Copy(self.memory[source], sources, self.memory[target], targets, self.time)
        self.copies.append(copy)
        return copy

    # --- requests -----------------------------------------------------------------------------------

    @rule(target=leases, tokens=TOKENS, salt=SALTS, no_store=st.booleans(), prefetches=st.booleans())
    def acquire(self, tokens, salt, no_store, prefetches):
        self.time += 1
        namespace = Namespace(salt, "", "", "w")
        sequence = TokenSequence(np.array(tokens, dtype=np.int32))
        prefetch = self.cache.prefetch(namespace, sequence.view(0, len(tokens) - 1)) if prefetches else None
        for _ in range(12):
            if prefetch is not None and self.cache.is_awaited(prefetch):
                self.turn(1)
        lease = self.cache.acquire(namespace, sequence, max_cached_tokens=len(tokens) - 1, no_store=no_store)
        needed = len(tokens) // PAGE + 1 - lease.num_pages
        if self.cache.extend(lease, needed) is None:
            assert self.cache.num_available < needed
            self.cache.release(lease)
            return None
        for index in range(lease.num_shared_pages, len(tokens) // PAGE):
            self._compute(lease, index, self.time)
        return lease

    def _compute(self, lease: Lease, index: int, time: int) -> None:
        path = tuple(lease.tokens.view(0, (index + 1) * PAGE).tolist())
        page = int(lease.page_table()[index])
        self.memory[Tier.DEVICE].content[page] = len(self.contents)
        self.memory[Tier.DEVICE].began[page] = time
        self.contents.append(Content(lease.root.namespace, path, time))

    @rule(tokens=TOKENS, salt=SALTS)
    def serve(self, tokens, salt):
        """A request from its beginning to its end."""
        lease = self.acquire(tokens, salt, no_store=False, prefetches=True)
        self.publish(lease, 1.0)
        self.release(lease, parks=False)

    def is_open(self, lease) -> bool:
        return lease is not None and not lease.is_released and lease not in self.given

    @rule(lease=leases, share=st.floats(0, 1))
    def publish(self, lease, share):
        if self.is_open(lease):
            self.cache.publish(lease, int(len(lease.tokens) * share))
            self.cache.settle(lease)

    @rule(lease=leases, token=st.integers(0, 2))
    def generate(self, lease, token):
        if not self.is_open(lease):
            return
        if (len(lease.tokens) + 1) // PAGE + 1 > lease.num_pages and self.cache.extend(lease, 1) is None:
            return
        self.time += 1
        lease.tokens.append(token)
        if len(lease.tokens) % PAGE == 0:
            self._compute(lease, len(lease.tokens) // PAGE - 1, self.time - PAGE)  # begun with its first token

    @rule(lease=leases, parks=st.booleans())
    def release(self, lease, parks):
        if self.is_open(lease):
            if parks:
                self.cache.publish(lease, len(lease.tokens))
                self.cache.back_up(lease)
            self.cache.release(lease)

    @rule(tokens=TOKENS, salt=SALTS)
    def load(self, tokens, salt):
        """A request that finds pages on the host; it acquires anew when they have come."""
        sequence = TokenSequence(np.array(tokens, dtype=np.int32))
        lease = self.cache.acquire(Namespace(salt, "", "", "w"), sequence, max_cached_tokens=len(tokens))
        self.time += 1
        if self.cache.load(lease, max_cached_tokens=len(tokens)) is None:
            self.cache.release(lease)
        else:
            self.given.add(lease)

    # --- copies and calls of the store --------------------------------------------------------------

    @precondition(lambda self: self.copies)
    @rule(data=st.data(), fails=st.booleans())
    def end_copy(self, data, fails):
        copy = self.copies.pop(data.draw(st.integers(0, len(self.copies) - 1)))
        copy.end(fails=fails and self.time % 3 == 0)
        self.cache.apply_finished()

    @rule(count=st.integers(1, 4))
    def turn(self, count):
        """The loop looks: copies and calls that ended are taken in, new ones begun."""
        for _ in range(count):
            self.time += 1
            self.cache.apply_finished()

    @rule(seconds=st.sampled_from([0.01, 1.0, 3.0]))
    def wait(self, seconds):
        self.clock.advance(seconds)

    @rule(tokens=TOKENS)
    def serve_while_the_store_hangs(self, tokens):
        """Its calls are given up after five seconds, and go on later, whoever has their pages then."""
        self.jobs.hang_rate = 1.0
        self.serve(tokens, "")
        self.quiet(1)
        self.jobs.hang_rate = 0.0
        self.clock.advance(6.0)
        self.turn(1)

    @rule()
    def come_back(self):
        self.jobs.let_go()

    @rule(rounds=st.integers(1, 3))
    def quiet(self, rounds):
        """Everything under way ends, in its order."""
        for _ in range(8 * rounds):
            while self.copies:
                self.copies.pop(0).end(fails=False)
            self.turn(1)

    @rule(tokens=TOKENS, salt=SALTS)
    def find_in_the_store(self, tokens, salt):
        """Nothing is left elsewhere; a request comes back."""
        self.quiet(1)
        self.retire(None, None, frozenset({DEVICE, HOST}))
        self.cache.prefetch(Namespace(salt, "", "", "w"), np.array(tokens, dtype=np.int32))
        self.turn(2)

    @rule(data=st.data())
    def flip_a_bit(self, data):
        if self.backend._pages:
            key = data.draw(st.sampled_from(sorted(self.backend._pages, key=lambda key: (key.page, key.bucket.id))))
            self.backend.flip_bit(key, data.draw(st.integers(700, 831)))  # most of the page is header

    @rule()
    def replace_the_store(self):
        self.quiet(1)
        self.attach()

    def attach(self):
        if self.cache.storage is not None:
            self.cache.detach_storage()
        assert self.cache.transfers is not None
        self.cache.attach_storage(
            StorageTier(
                self.backend,
                tree=self.cache.tree,
                host=self.cache.books[Tier.HOST],
                host_pages=self.memory[Tier.HOST],
                names=StorageNames(FINGERPRINT),
                jobs=self.jobs,
                clock=self.clock,
                settings=StorageSettings(min_prefetch_tokens=PAGE),
                counters=self.cache.transfers.counters,
            )
        )
        self.backend._is_closed = False

    # --- flushes ------------------------------------------------------------------------------------

    @rule(salt=st.none() | SALTS, prefix=st.none() | st.none() | TOKENS, tiers=TIERS)
    def retire(self, salt, prefix, tiers):
        ids = None if prefix is None or Tier.STORAGE in tiers else np.array(prefix, dtype=np.int32)
        scope = Scope(cache_salt=salt, prefix=ids, tiers=tiers)
        would = self.cache.preview(scope)
        did = self.cache.retire(scope)
        assert (would.freed, would.retired) == (did.freed, did.retired)
        self.retired.append((self.time, scope))
        self.time += 1

    @invariant()
    def books_are_right(self):
        check_invariants(self.cache)

    @invariant()
    def every_page_is_what_its_path_says_and_younger_than_every_flush(self):
        for root in self.cache.tree.roots.values():
            for node in self.cache.tree.subtree(root):
                for tier, run in node.runs.items():
                    self._check(node, tier, run)

    def _check(self, node, tier, run) -> None:
        path = tuple(self.cache.tree.path(node).tolist())
        first = len(path) // PAGE - len(run.pages)
        for index, page in enumerate(run.pages.tolist(), start=first):
            memory = self.memory[tier]
            content = self.contents[int(memory.content[page])]
            assert content is not None and memory.content[page] > 0
            assert (content.namespace, content.path) == (node.namespace, path[: (index + 1) * PAGE])
            for at, scope in self.retired:
                if scope.has_namespace(node.namespace):
                    limit = scope.limit_for(np.array(path, dtype=np.int32), PAGE)
                    if limit is None or index < limit:
                        continue
                    began = memory.began[page]
                    assert tier not in scope.tiers or at < began, f"flushed on {tier.name}"
                    is_old = memory.is_from_store[page] and STORAGE in scope.tiers and content.time <= at < began
                    assert not is_old, "read after the store was flushed, and computed before"

    def teardown(self):
        for lease in list(self.cache.leases):
            if lease not in self.given:
                self.cache.release(lease)
        self.jobs.hang_rate = 0.0
        self.jobs.let_go()
        for _ in range(300):
            while self.copies:
                self.copies.pop().end(fails=False)
            self.clock.advance(0.01)
            self.cache.apply_finished()
            if not self.cache.in_flight():
                break
        check_invariants(self.cache)
        assert not self.cache.leases and not self.cache.in_flight()
        for books in self.cache.books.values():
            assert books.num_available == books.pool.capacity, f"pages of {books.tier.name} did not come back"


TiersMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTiers = TiersMachine.TestCase
