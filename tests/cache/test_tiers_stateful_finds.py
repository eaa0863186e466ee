"""The state machine of test_tiers_stateful.py notices caches that are wrong in one way each."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from test_tiers_stateful import TiersMachine

from headwater.cache.lease import Lease
from headwater.cache.page_pool import PageIds
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.radix_tree import Node, Run
from headwater.cache.storage.reader import StorageReader
from headwater.cache.storage.tier import StorageTier
from headwater.cache.tier_pages import TierPages
from headwater.cache.transfer_engine import TransferEngine
from headwater.simulation.mutants import cache as mutants_of_cache
from headwater.simulation.mutants import engine as mutants_of_engine
from headwater.simulation.mutants.registry import MUTANTS, Mutant, Patch

OF_THE_CACHE = """
    publish_limit_is_skipped prefix_flush_limits_nobody prefix_inside_a_node_is_missed prefix_flush_takes_whole_nodes
    no_store_is_ignored copies_pin_nothing copies_survive_a_flush dropped_copies_are_attached
    failed_copies_are_attached copies_end_only_under_load replaced_pages_are_forgotten unpin_compares_with_the_tree
    retired_pages_are_freed_while_pinned pinned_pages_are_evicted split_swaps_the_pages arriving_pages_are_not_held
""".split()
OF_THE_STORE = """
    store_is_read_while_it_is_flushed store_generations_are_not_in_the_key store_keys_forget_the_salt
    prefetches_survive_a_flush flipped_bits_are_served unacknowledged_flushes_are_forgotten
    hanging_stores_are_waited_for
""".split()


def pages_are_marked_when_they_are_shared() -> list[Patch]:
    """A page computed before a flush of the store passes for one computed after it."""
    right = PrefixCache._share

    def share(self: PrefixCache, lease: Lease, node: Node) -> None:
        if self.storage is not None:
            lease.generations = self.storage.known_generations(lease.root.namespace)
        right(self, lease, node)

    return [(PrefixCache, "_share", share)]


def dropped_prefetches_are_attached() -> list[Patch]:
    """What was read before a flush appears after it."""
    right = StorageReader._attach

    def attach(self: StorageReader, prefetch: Any, pages: Any, num_good: int) -> None:
        prefetch.is_dropped = False
        right(self, prefetch, pages, num_good)

    return [(StorageReader, "_attach", attach)]


def leases_remember_another_store() -> list[Patch]:
    """The generations of the store that was attached when a request began are taken for those of the next one."""
    right = PrefixCache.detach_storage

    def detach(self: PrefixCache) -> StorageTier:
        before = {lease: lease.generations for lease in self.leases}
        storage = right(self)
        for lease, generations in before.items():
            lease.generations = generations
        return storage

    return [(PrefixCache, "detach_storage", detach)]


def pages_remember_another_store() -> list[Patch]:
    """The same, of pages that are on their way to the host."""
    right = PrefixCache.detach_storage

    def detach(self: PrefixCache) -> StorageTier:
        nodes = [node for root in self.tree.roots.values() for node in self.tree.subtree(root)]
        before = {run: run.generations for node in nodes for run in node.runs.values()}
        storage = right(self)
        for run, generations in before.items():
            run.generations = generations
        return storage

    return [(PrefixCache, "detach_storage", detach)]


def copies_in_flight_remember_another_store() -> list[Patch]:
    """The same, of pages that were cut while they were on their way to the host."""
    return [(TransferEngine, "forget_generations", lambda self: None)]


def copies_are_as_young_as_what_they_join() -> list[Patch]:
    """A page that was computed again gives its age to the copies of it: to the host's, and to the one on its way there.

    And the other way round: a page that joins one on the host passes for as old as that one.
    """
    right = TierPages.attach

    def attach(self: TierPages, node: Node, pages: PageIds, **fields: Any) -> Run:
        others = [run.generations for run in node.runs.values()]
        return right(self, node, pages, **(fields | {"generations": others[0] if others else fields["generations"]}))

    return [(TierPages, "attach", attach)]


MORE = [
    copies_are_as_young_as_what_they_join,
    pages_are_marked_when_they_are_shared,
    dropped_prefetches_are_attached,
    leases_remember_another_store,
    pages_remember_another_store,
    copies_in_flight_remember_another_store,
]
assert mutants_of_cache and mutants_of_engine  # they register what is looked up by name
ALL = [MUTANTS[name] for name in OF_THE_CACHE + OF_THE_STORE] + [
    Mutant(make.__name__, make.__doc__ or "", "", 0, make) for make in MORE
]


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", ALL, ids=lambda mutant: mutant.name)
def test_a_wrong_cache_is_noticed(mutant: Mutant) -> None:
    only_generated = settings(
        max_examples=600,
        stateful_step_count=50,
        deadline=None,
        phases=[Phase.generate],
        derandomize=True,
        report_multiple_bugs=False,  # one is enough, so it stops there
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    with mutant.in_force(), pytest.raises(AssertionError):
        run_state_machine_as_test(TiersMachine, settings=only_generated)
