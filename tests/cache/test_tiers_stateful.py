"""Tree, pools, copies and a store against a dict model, under every order of operations Hypothesis finds."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule
from tiers_model import PAGE, Content, Copy, EarlyCopy, Flush, Memory, Store

from headwater.cache.host_tier import HostTier, WritePolicy
from headwater.cache.invariants import check_invariants
from headwater.cache.lease import Lease, TokenSequence
from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.storage.host_side import HostSide
from headwater.cache.storage.names import StorageNames
from headwater.cache.storage.tier import StorageSettings, StorageTier
from headwater.clock import ManualClock
from headwater.simulation.fakes.jobs import FakeJobRunner
from headwater.storage.page_key import Fingerprint

STEMS = ([0] * 13, [0] * 6 + [1] * 7, [1] * 13)  # few, so that what one wrote the others find
TOKENS = st.builds(lambda stem, length: stem[:length], st.sampled_from(STEMS), st.integers(1, 13))
SALTS = st.sampled_from(["", "", "a"])
DEVICE, HOST, STORAGE = Tier.DEVICE, Tier.HOST, Tier.STORAGE
TIERS = st.sampled_from([{DEVICE, HOST}, {DEVICE, HOST}, set(Tier), {STORAGE}, {DEVICE}, {HOST}]).map(frozenset)
FINGERPRINT = Fingerprint(
    weights_id="", model_config_hash="m", kv_dtype="d", page_size=PAGE, num_layers=1, num_kv_heads=1, head_dim=1
)


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
        self.flushes: list[Flush] = []
        self.given: set[Lease] = set()
        self.private: set[Lease] = set()
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
        self.memory[Tier.HOST].pool = self.cache.tier_pages[Tier.HOST].pool
        self.memory[Tier.HOST].now = lambda: (self.time, self.attached)
        self.stores = [Store(capacity_bytes=1 << 20) for _ in range(2)]
        self.attach(0)

    # --- the copier ---------------------------------------------------------------------------------

    def offload(self, device_pages, host_pages) -> Copy:
        return self._copy(Tier.DEVICE, device_pages, Tier.HOST, host_pages)

    def restore(self, host_pages, device_pages) -> Copy:
        return self._copy(Tier.HOST, host_pages, Tier.DEVICE, device_pages)

    def _copy(self, source: Tier, sources, target: Tier, targets) -> Copy:
        make = EarlyCopy if target is Tier.DEVICE else Copy
        copy = make(self.memory[source], sources, self.memory[target], targets, self.time)
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
        if no_store:
            self.private.add(lease)
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
        self.contents.append(Content(lease.root.namespace, path, time, lease in self.private))

    @rule(tokens=TOKENS, salt=SALTS)
    def serve(self, tokens, salt):
        """A request from its beginning to its end."""
        lease = self.acquire(tokens, salt, no_store=False, prefetches=True)
        self.publish(lease, 1.0)
        self.release(lease, parks=False)

    @rule(tokens=TOKENS, salt=SALTS)
    def serve_and_leave_nothing(self, tokens, salt):
        self.end(self.acquire(tokens, salt, no_store=True, prefetches=False))

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
                self.cache.lower.back_up(lease)
            self.cache.release(lease)

    @rule(tokens=TOKENS, salt=SALTS)
    def restore_prefix(self, tokens, salt):
        """A request that finds pages on the host; it acquires anew when they have come."""
        sequence = TokenSequence(np.array(tokens, dtype=np.int32))
        lease = self.cache.acquire(Namespace(salt, "", "", "w"), sequence, max_cached_tokens=len(tokens))
        self.time += 1
        if self.cache.restore(lease, max_cached_tokens=len(tokens)) is None:
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

    @rule()
    def let_arrive(self):
        """Restored pages are found while they are still being copied."""
        for copy in self.copies:
            if isinstance(copy, EarlyCopy) and not copy.has_arrived:
                copy.arrive()
        self.turn(1)

    @rule(tokens=TOKENS, salt=SALTS, tiers=TIERS)
    def use_what_arrives(self, tokens, salt, tiers):
        """Pages that arrive are flushed, and wanted by others, before they are there."""
        self.serve(tokens, salt)
        self.quiet(1)
        self.retire(salt, None, frozenset({DEVICE}))
        self.restore_prefix(tokens, salt)
        self.let_arrive()
        self.serve([*tokens[: len(tokens) // 2], 1], salt)
        self.retire(salt, None, tiers)
        for other in ("", "a"):
            self.serve(STEMS[-1], other)

    @rule(tokens=TOKENS, salt=SALTS)
    def fail_to_copy(self, tokens, salt):
        """Nothing arrives of what was on its way."""
        self.serve(tokens, salt)
        for copy in self.copies:
            copy.end(fails=True)
        self.copies.clear()
        self.turn(1)

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
        hung = self.jobs.hung.copy()
        self.clock.advance(6.0)
        self.turn(1)
        assert not any(job.is_open for job in hung), "the loop still waits"

    @rule()
    def come_back(self):
        self.jobs.release_hanging()

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

    @rule(tokens=TOKENS, salt=SALTS, length=st.integers(1, 13), tiers=TIERS)
    def flush_under_a_request(self, tokens, salt, length, tiers):
        """By prefix; what it computed before is not shared after."""
        lease = self.acquire(tokens, salt, no_store=False, prefetches=False)
        self.retire(salt, tokens[:length], tiers)
        self.end(lease)

    @rule(tokens=TOKENS, salt=SALTS, tier=st.sampled_from([HOST, DEVICE]))
    def flush_under_a_copy(self, tokens, salt, tier):
        """What a copy brings after the flush of its target does not appear."""
        self.serve(tokens, salt)
        if tier is DEVICE:
            self.quiet(1)
            self.retire(salt, None, frozenset({DEVICE}))
            self.restore_prefix(tokens, salt)
        self.retire(salt, None, frozenset({tier}))
        self.quiet(1)

    @rule(salt=SALTS)
    def crowd_the_device(self, salt):
        """One holds what was used longest ago, and another needs more than is free."""
        first, *_, last = STEMS
        self.serve(first[:5], salt)
        self.quiet(1)
        held = self.acquire(first[:5], salt, no_store=False, prefetches=False)
        for other in ("", "a"):
            self.serve(last, other)
            self.quiet(1)
        assert not self.is_open(held) or held.run is None or not held.run.is_retired, "evicted, though it is held"
        self.end(held)

    @rule(tokens=TOKENS, salt=SALTS, num_head=st.integers(1, 6), is_cut=st.booleans())
    def change_the_store_under_a_copy(self, tokens, salt, num_head, is_cut):
        """What is on its way to the host must not pass for computed after a flush of the next store."""
        self.retire(None, None, frozenset({STORAGE}))
        self.quiet(1)
        self.serve(tokens[:num_head], salt)
        self.serve(tokens, salt)
        if is_cut:
            self.cut_under_a_copy(salt)
        self.attach(1 - self.attached)
        self.retire(None, None, frozenset({STORAGE}))
        self.turn(8)  # it acknowledges; the copy is still on its way
        self.find_in_the_store(tokens, salt)
        self.turn(12)

    @rule(tokens=TOKENS, salt=SALTS, tiers=TIERS)
    def flush_under_a_prefetch(self, tokens, salt, tiers):
        """What was on its way up when it was flushed may end, but not appear."""
        self.serve(tokens, salt)
        self.find_in_the_store(tokens, salt)
        self.retire(salt, None, tiers)
        self.turn(12)

    @rule(tokens=TOKENS, salt=SALTS)
    def flush_the_store_under_a_request(self, tokens, salt):
        """What it computed before must not be stored as if it had been computed after."""
        lease = self.acquire(tokens, salt, no_store=False, prefetches=True)
        self.retire(None, None, frozenset({STORAGE}))
        self.quiet(1)
        self.end(lease)
        self.find_in_the_store(tokens, salt)
        self.turn(12)

    @rule(tokens=TOKENS, salt=SALTS, num_head=st.integers(1, 6))
    def flush_the_store_under_a_copy(self, tokens, salt, num_head):
        """What was computed before is still on its way to the host when the same is computed anew."""
        self.serve(tokens[:num_head], salt)
        self.serve(tokens, salt)
        self.cut_under_a_copy(salt)
        self.retire(None, None, frozenset({STORAGE}))
        self.turn(8)
        self.serve(tokens, salt)
        self.quiet(1)
        self.find_in_the_store(tokens, salt)
        self.turn(12)

    def cut_under_a_copy(self, salt) -> None:
        """The lower part of a text reaches the host, and the device loses all of it: the upper part is on its way."""
        if self.copies:
            self.copies.pop().end(fails=False)
        self.turn(1)
        self.retire(salt, None, frozenset({DEVICE}))

    @rule(tokens=TOKENS, salt=SALTS)
    def share_late_what_the_host_has(self, tokens, salt):
        """What was computed before a flush of the store joins what was computed after it, and outlives it."""
        lease = self.acquire(tokens[:5], salt, no_store=False, prefetches=True)
        self.retire(None, None, frozenset({STORAGE}))
        self.quiet(1)
        self.serve(tokens[:5], salt)
        self.quiet(1)
        for other in ("", "a"):
            self.serve(STEMS[-1][::-1], other)  # takes the room of what nobody holds
            self.quiet(1)
        self.end(lease)
        self.retire(salt, None, frozenset({HOST}))
        store = self.stores[self.attached]
        store.delete(store.held())
        self.release(self.acquire(tokens[:5], salt, no_store=False, prefetches=False), parks=True)
        self.quiet(1)

    @rule(tokens=TOKENS, salt=SALTS, which=st.none() | st.integers(0, 1))
    def flush_while_the_store_does_not_acknowledge(self, tokens, salt, which):
        """Until it has, nothing in scope is read from it, though it would answer; nor from its successor."""
        self.serve(tokens, salt)
        self.quiet(1)
        if which is not None:
            self.attach(1 - which)
        self.stores[self.attached].refuses_flushes = True
        self.retire(None, None, frozenset(Tier))
        if which is not None:
            self.attach(which)
        self.find_in_the_store(tokens, salt)
        self.turn(12)
        for store in self.stores:
            store.refuses_flushes = False
        self.clock.advance(1.0)
        self.quiet(1)

    @rule(data=st.data())
    def flip_a_bit(self, data):
        store = self.stores[self.attached]
        if store.held():
            key = data.draw(st.sampled_from(store.held()))
            store.flip_bit(key, data.draw(st.integers(700, 831)))  # most of the page is header

    @rule(tokens=TOKENS, salt=SALTS, bit=st.integers(0, 831))
    def damage_the_store(self, tokens, salt, bit):
        self.serve(tokens, salt)
        self.quiet(1)
        store = self.stores[self.attached]
        for key in store.held():
            store.flip_bit(key, bit)
        self.find_in_the_store(tokens, salt)
        self.turn(12)

    @rule(which=st.integers(0, 1))
    def replace_the_store(self, which):
        self.quiet(1)
        self.attach(which)

    @rule(tokens=TOKENS, salt=SALTS, which=st.integers(0, 1), is_on_its_way=st.booleans())
    def replace_the_store_under_a_request(self, tokens, salt, which, is_on_its_way):
        """What one store's generations say of it says nothing about the other's."""
        self.retire(None, None, frozenset({STORAGE}))
        self.quiet(1)
        lease = self.acquire(tokens, salt, no_store=False, prefetches=True)
        if is_on_its_way:
            self.publish(lease, 1.0)
        self.attach(which)
        self.retire(None, None, frozenset({STORAGE}))
        self.turn(12)  # it acknowledges; copies are still on their way
        self.end(lease)
        self.find_in_the_store(tokens, salt)
        self.turn(12)

    def end(self, lease) -> None:
        """All that a request has computed is shared, and on its way down; it is over."""
        self.publish(lease, 1.0)
        self.release(lease, parks=False)
        self.quiet(1)

    def attach(self, which: int) -> None:
        if self.cache.lower.storage is not None:
            self.cache.detach_storage()
            for flush in self.flushes:
                if not flush.retirement.is_acknowledged:
                    flush.stores.add(which)  # the next store carries it out, too; this one still owes it
        assert self.cache.lower.transfers is not None
        self.attached = which
        self.turn(1)  # the other is closed
        self.stores[which].reopen()
        host = HostSide(
            tree=self.cache.tree,
            tier=self.cache.tier_pages[Tier.HOST],
            memory=self.memory[Tier.HOST],
            names=StorageNames(FINGERPRINT),
            counters=self.cache.lower.transfers.counters,
            clock=self.clock,
        )
        settings = StorageSettings(min_prefetch_tokens=PAGE)
        self.cache.lower.attach(
            StorageTier(self.stores[which], host, jobs=self.jobs, settings=settings, place=str(which))
        )

    # --- flushes ------------------------------------------------------------------------------------

    @rule(salt=st.none() | SALTS, prefix=st.none() | st.none() | TOKENS, tiers=TIERS)
    def retire(self, salt, prefix, tiers):
        ids = None if prefix is None or Tier.STORAGE in tiers else np.array(prefix, dtype=np.int32)
        scope = Scope(cache_salt=salt, prefix=ids, tiers=tiers)
        would = self.cache.preview(scope)
        did = self.cache.retire(scope)
        assert (would.freed, would.retired) == (did.freed, did.retired)
        self.flushes.append(Flush(self.time, scope, {self.attached}, did))
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

    @invariant()
    def what_a_flushed_store_has_and_would_return_is_younger_than_the_flush(self):
        for which, store in enumerate(self.stores):
            for number in store.contents():
                content = self.contents[number] if 0 < number < len(self.contents) else None
                for flush in self.flushes if content is not None else ():
                    is_of_it = STORAGE in flush.scope.tiers and flush.stores == {which}
                    if is_of_it and flush.retirement.is_acknowledged and content.time <= flush.time:
                        index = len(content.path) // PAGE - 1
                        assert not flush.covers(content.namespace, content.path, index), "stored as if it were younger"

    def _check(self, node, tier, run) -> None:
        path = tuple(self.cache.tree.path(node).tolist())
        first = len(path) // PAGE - len(run.pages)
        for index, page in enumerate(run.pages.tolist(), start=first):
            memory = self.memory[tier]
            assert 0 < memory.content[page] < len(self.contents), "nobody computed this"
            content = self.contents[int(memory.content[page])]
            assert content is not None and not content.is_private
            assert (content.namespace, content.path) == (node.namespace, path[: (index + 1) * PAGE])
            for flush in self.flushes:
                self._check_against(flush, node, path, tier=tier, index=index, page=page)

    def _check_against(self, flush: Flush, node, path, *, tier: Tier, index: int, page: int) -> None:
        if not flush.covers(node.namespace, path, index):
            return
        memory = self.memory[tier]
        began, content = memory.began[page], self.contents[int(memory.content[page])]
        assert content is not None
        assert tier not in flush.scope.tiers or flush.time < began, f"flushed on {tier.name}"
        if STORAGE in flush.scope.tiers and memory.store[page] in flush.stores:
            is_old = content.time <= flush.time < began
            assert not is_old, "read after the store was flushed, and computed before"

    def teardown(self):
        for lease in list(self.cache.leases):
            if lease not in self.given:
                self.cache.release(lease)
        self.jobs.hang_rate = 0.0
        self.jobs.release_hanging()
        for _ in range(300):
            while self.copies:
                self.copies.pop().end(fails=False)
            self.clock.advance(0.01)
            self.cache.apply_finished()
            if not self.cache.lower.in_flight():
                break
        check_invariants(self.cache)
        assert not self.cache.leases and not self.cache.lower.in_flight()
        for pages in self.cache.tier_pages.values():
            assert pages.num_available == pages.pool.capacity, f"pages of {pages.tier.name} did not come back"


TiersMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
TestTiers = TiersMachine.TestCase


@pytest.mark.parametrize("num_tokens", [4, 8, 13])
@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("flush_the_store_under_a_copy", {"num_head": 3}),
        ("change_the_store_under_a_copy", {"num_head": 3, "is_cut": True}),
        ("share_late_what_the_host_has", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pages_of_a_node_from_before_and_after_a_flush_of_the_store(rule, more, num_tokens):
    """Random runs found it once in millions of turns: the old copy was stored under the counters of the new one."""
    machine = TiersMachine()
    getattr(machine, rule)(tokens=STEMS[0][:num_tokens], salt="", **more)
    machine.what_a_flushed_store_has_and_would_return_is_younger_than_the_flush()
    machine.every_page_is_what_its_path_says_and_younger_than_every_flush()
    machine.teardown()


def test_a_flush_that_finds_only_copies_under_way_is_a_generation():
    machine = TiersMachine()
    machine.serve(tokens=STEMS[0], salt="")
    before = machine.cache.generation
    machine.retire(salt=None, prefix=None, tiers=frozenset({HOST}))
    assert machine.cache.generation == before + 1
    machine.retire(salt=None, prefix=None, tiers=frozenset({HOST}))
    assert machine.cache.generation == before + 1, "there was nothing left to drop"
    machine.teardown()
