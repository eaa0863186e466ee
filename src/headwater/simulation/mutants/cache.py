"""Mutants of the tree, pages, leases and copies."""

from typing import Any

from headwater.cache.eviction import LruLeaves
from headwater.cache.namespace import Scope, Tier
from headwater.cache.pins import PinBoard
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.radix_tree import RadixTree, Run
from headwater.cache.retirement import Retirement
from headwater.cache.tier_pages import TierPages
from headwater.cache.transfer import Transfer
from headwater.cache.transfer_engine import TransferEngine
from headwater.cache.tree_cutter import TreeCutter
from headwater.engine.kv_events_recorder import KvEventsRecorder
from headwater.kv_events import AllBlocksCleared
from headwater.scheduling.request import Request
from headwater.simulation.fakes.copier import FakeCopier
from headwater.simulation.mutants.registry import Patch, mutant


@mutant(profile="flush")
def publish_limit_is_skipped() -> list[Patch]:
    """After a flush, running requests still publish pages that they computed before it."""

    def limit(self: TreeCutter, scope: Scope, retirement: Retirement) -> None:
        pass

    return [(TreeCutter, "_limit_leases", limit)]


@mutant(profile="flush")
def prefix_flush_limits_nobody() -> list[Patch]:
    """A flush by prefix misses the leases below it: they publish after the retirement."""
    right = Scope.limit_for

    def limit_for(self: Scope, tokens: Any, page_size: int) -> int | None:
        return None if self.prefix is not None else right(self, tokens, page_size)

    return [(Scope, "limit_for", limit_for)]


@mutant(profile="flush")
def prefix_inside_a_node_is_missed() -> list[Patch]:
    """A prefix that ends inside a node retires nothing there."""
    right = RadixTree.below

    def below(self: RadixTree, root: Any, prefix: Any, *, is_dry: bool = False) -> list[Any]:
        found = right(self, root, prefix, is_dry=True)
        first = (len(prefix) - 1) // self.page_size
        return [node for node in found if node.parent is not None and self.depth(node.parent) == first]

    return [(RadixTree, "below", below)]


@mutant(profile="flush")
def prefix_flush_takes_whole_nodes() -> list[Patch]:
    """A flush by prefix also takes the pages before the prefix's last one."""
    right = RadixTree.below

    def below(self: RadixTree, root: Any, prefix: Any, *, is_dry: bool = False) -> list[Any]:
        return right(self, root, prefix, is_dry=True)

    return [(RadixTree, "below", below)]


@mutant(profile="training")
def weights_are_not_in_the_namespace() -> list[Patch]:
    """Requests match pages that other weights computed."""
    right = Request.namespace

    def namespace(self: Request, weights_id: str) -> Any:
        return right(self, "")

    return [(Request, "namespace", namespace)]


@mutant(seed=1)
def salt_is_not_in_the_namespace() -> list[Patch]:
    """Tenants see each other's cache."""
    right = Request.namespace

    def namespace(self: Request, weights_id: str) -> Any:
        return right(self, weights_id)._replace(cache_salt="")

    return [(Request, "namespace", namespace)]


@mutant(seed=1)
def extra_key_is_not_in_the_namespace() -> list[Patch]:
    """Requests of one extra key match pages of another."""
    right = Request.namespace

    def namespace(self: Request, weights_id: str) -> Any:
        return right(self, weights_id)._replace(extra_key="")

    return [(Request, "namespace", namespace)]


@mutant()
def no_store_is_ignored() -> list[Patch]:
    """A `no_store` request's pages are shared."""
    right = PrefixCache.acquire

    def acquire(self: PrefixCache, *args: Any, no_store: bool = False, **kwargs: Any) -> Any:
        return right(self, *args, no_store=False, **kwargs)

    return [(PrefixCache, "acquire", acquire)]


@mutant()
def copies_pin_nothing() -> list[Patch]:
    """The pages of an offload can be evicted, freed and reused during the copy."""
    right, right_pinned = TransferEngine.offload, Transfer.pinned

    def offload(self: TransferEngine, node: Any, *, is_parking: bool = False) -> bool:
        has_begun = right(self, node, is_parking=is_parking)
        if has_begun:
            for run in node.runs[Tier.DEVICE].chain():
                self._tier_pages[Tier.DEVICE].unpin(run)
        return has_begun

    def pinned(self: Transfer) -> list[Run]:
        return [] if self.source_tier is Tier.DEVICE else right_pinned(self)

    return [(TransferEngine, "offload", offload), (Transfer, "pinned", pinned)]


@mutant(profile="tiers", seed=8)
def copies_survive_a_flush() -> list[Patch]:
    """A flush does not mark the copies in flight; they attach retired pages."""
    return [(TransferEngine, "mark_retired", lambda self, scope: 0)]


@mutant(profile="tiers", seed=8)
def dropped_copies_are_attached() -> list[Patch]:
    """A copy that is marked as dropped is attached."""
    right = TransferEngine._deliver

    def deliver(self: TransferEngine, transfer: Transfer, *, is_done: bool) -> Any:
        transfer.is_dropped = False
        return right(self, transfer, is_done=is_done)

    return [(TransferEngine, "_deliver", deliver)]


@mutant(profile="tiers")
def failed_copies_are_attached() -> list[Patch]:
    """A copy that failed is used."""
    right = TransferEngine._deliver

    def deliver(self: TransferEngine, transfer: Any, *, is_done: bool) -> Any:
        transfer.handle.has_failed = False
        return right(self, transfer, is_done=is_done)

    return [(TransferEngine, "_deliver", deliver)]


@mutant(profile="tiers")
def arriving_pages_are_not_held() -> list[Patch]:
    """A restore releases its pages when they are readable, before it has written them all."""

    def hold(self: TransferEngine, transfer: Transfer, runs: list[Run]) -> None:
        pass

    return [(TransferEngine, "_hold", hold)]


@mutant(profile="tiers")
def steps_do_not_wait_for_arriving_pages() -> list[Patch]:
    """A step does not wait for restored pages that are still arriving."""
    return [(FakeCopier, "wait", lambda self: None)]


@mutant(profile="tiers")
def copies_end_only_under_load() -> list[Patch]:
    """The engine notices finished copies only while a lease exists: an idle engine never becomes idle."""
    right = PrefixCache.apply_finished

    def apply_finished(self: PrefixCache) -> bool:
        return bool(self.leases) and right(self)

    return [(PrefixCache, "apply_finished", apply_finished)]


@mutant(seed=4)
def replaced_pages_are_freed_at_once() -> list[Patch]:
    """A request's own copies of pages found in the tree are freed while a step still reads them."""
    right = PrefixCache.publish

    def publish(self: PrefixCache, lease: Any, num_tokens: int) -> Any:
        changes = right(self, lease, num_tokens)
        self.settle(lease)
        return changes

    return [(PrefixCache, "publish", publish)]


@mutant()
def replaced_pages_are_forgotten() -> list[Patch]:
    """A request's own copies of pages found in the tree are never freed."""
    return [(PrefixCache, "settle", lambda self, lease: None)]


@mutant(profile="flush")
def unpin_compares_with_the_tree() -> list[Patch]:
    """Only pages that are still in the tree are unpinned: retired pages are never freed."""
    right = TierPages.unpin

    def unpin(self: TierPages, run: Run) -> None:
        if run.node.runs.get(self.tier) is run:
            right(self, run)

    return [(TierPages, "unpin", unpin)]


@mutant(profile="flush")
def retired_pages_are_freed_while_pinned() -> list[Patch]:
    """A flush frees pages that running requests read."""
    right = TierPages.cut

    def cut(self: TierPages, nodes: Any, retirement: Retirement) -> None:
        for node in nodes:
            if self.tier in node.runs:
                node.runs[self.tier].pins = 0
        right(self, nodes, retirement)

    return [(TierPages, "cut", cut)]


@mutant()
def pinned_pages_are_evicted() -> list[Patch]:
    """Eviction ignores pins."""

    def is_candidate(self: LruLeaves, node: Any) -> bool:
        below = (child.runs for child in node.children.values())
        return self._tier in node.runs and not any(self._tier in runs for runs in below)

    return [(LruLeaves, "_is_candidate", is_candidate)]


@mutant()
def split_swaps_the_pages() -> list[Patch]:
    """After a split into equal halves, the upper node has the lower node's pages."""
    right = RadixTree.split

    def split(self: RadixTree, node: Any, num_pages: int) -> Any:
        upper = right(self, node, num_pages)
        for tier, run in node.runs.items():
            above = upper.runs[tier]
            if len(above.pages) == len(run.pages):
                above.pages, run.pages = run.pages, above.pages
        return upper

    return [(RadixTree, "split", split)]


@mutant(profile="flush")
def drained_at_once() -> list[Patch]:
    """A drain does not wait for the pages that running requests hold."""
    return [(Retirement, "is_drained", property(lambda self: True))]


@mutant(profile="rough", seed=4)
def evictions_are_not_told() -> list[Patch]:
    """Evictions are missing from the events of the cache."""
    right = KvEventsRecorder.removed

    def removed(self: KvEventsRecorder, node: Any, tier: Tier, *, reason: str) -> None:
        if reason != "evicted":
            right(self, node, tier, reason=reason)

    return [(KvEventsRecorder, "removed", removed)]


@mutant(profile="rough", seed=4)
def a_flush_of_one_tier_clears_all() -> list[Patch]:
    """In the events of the cache, a flush of one tier takes the pages of all tiers away."""
    right = KvEventsRecorder.cleared

    def cleared(self: KvEventsRecorder, generation: int, scope: Scope) -> None:
        right(self, generation, scope)
        if scope.is_everything:
            self._events.append(AllBlocksCleared(generation=generation))

    return [(KvEventsRecorder, "cleared", cleared)]


@mutant(profile="rough")
def pins_hold_nothing() -> list[Patch]:
    """A pin releases its pages immediately, and they are evicted."""
    right = PinBoard.pin

    def pin(self: PinBoard, *args: Any, **kwargs: Any) -> Any:
        made = right(self, *args, **kwargs)
        run = made.lease.run if made.lease is not None else None
        for each in run.chain() if run is not None else ():
            self._cache.tier_pages[Tier.DEVICE].unpin(each)
        return made

    return [(PinBoard, "pin", pin)]
