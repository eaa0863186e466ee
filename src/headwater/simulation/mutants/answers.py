"""Mutants of scopes, queues, order and the counts in answers."""

from dataclasses import replace
from typing import Any

from msgspec import structs

from headwater.cache.namespace import Scope, Tier
from headwater.cache.prefetch import Prefetch
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.radix_tree import RadixTree
from headwater.cache.storage.names import StorageNames
from headwater.cache.tree_cutter import TreeCutter
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.flush import Flush
from headwater.control.pause import Pause
from headwater.messages.generation import Finish
from headwater.scheduling.answers import NOT_FINITE
from headwater.scheduling.request import Request
from headwater.scheduling.scheduler import Scheduler
from headwater.scheduling.waiting_queue import WaitingQueue
from headwater.simulation.mutants.registry import Patch, mutant


@mutant(profile="flush", seed=2)
def flush_by_salt_and_key_drops_the_key() -> list[Patch]:
    """A flush by salt and key takes all keys of the salt."""
    right = Flush.scope

    def scope(self: Flush) -> Scope:
        found = right(self)
        return replace(found, extra_key=None) if found.cache_salt is not None else found

    return [(Flush, "scope", scope)]


@mutant(profile="flush", seed=1)
def flush_by_key_is_of_the_salt() -> list[Patch]:
    """A flush by key covers the salt of that name."""
    right = Flush.scope

    def scope(self: Flush) -> Scope:
        found = right(self)
        if found.cache_salt is None and found.extra_key is not None:
            return replace(found, cache_salt=found.extra_key, extra_key=None)
        return found

    return [(Flush, "scope", scope)]


@mutant(profile="tiers")
def flush_forgets_the_host() -> list[Patch]:
    """A flush of device and host leaves the host as it is."""
    right = Flush.scope

    def scope(self: Flush) -> Scope:
        found = right(self)
        is_of_both = {Tier.DEVICE, Tier.HOST} <= found.tiers
        return replace(found, tiers=found.tiers - {Tier.HOST}) if is_of_both else found

    return [(Flush, "scope", scope)]


@mutant(profile="training")
def updates_leave_the_host_as_it_is() -> list[Patch]:
    """Pages of earlier weights stay on the host forever."""
    right = PrefixCache.retire

    def retire(self: PrefixCache, scope: Scope) -> Any:
        is_update = scope.other_than_weights_id is not None
        return right(self, replace(scope, tiers=scope.tiers - {Tier.HOST}) if is_update else scope)

    return [(PrefixCache, "retire", retire)]


@mutant(profile="store", seed=12)
def stores_are_flushed_of_all_keys() -> list[Patch]:
    """A flush of a store by key raises the counter of everything."""
    right = StorageNames.scope

    def scope(self: StorageNames, scope: Scope) -> bytes:
        return right(self, replace(scope, extra_key=None))

    return [(StorageNames, "scope", scope)]


@mutant(profile="flush", seed=1000)
def limits_compare_whole_pages() -> list[Patch]:
    """A flush by prefix misses a lease that has begun the page of the prefix's last token."""
    right = Scope.limit_for

    def limit_for(self: Scope, tokens: Any, page_size: int) -> int | None:
        return right(self, tokens[: len(tokens) // page_size * page_size], page_size)

    return [(Scope, "limit_for", limit_for)]


@mutant(profile="flush")
def previews_count_whole_nodes() -> list[Patch]:
    """A dry run by prefix also counts the pages before the prefix."""
    return [(TreeCutter, "_num_pages_above", lambda self, top, scope: 0)]


@mutant(profile="flush")
def previews_take_held_pages_for_free() -> list[Patch]:
    """A dry run reports pages in use as pages that would be freed immediately."""
    right = TreeCutter.preview

    def preview(self: TreeCutter, scope: Scope, *, generation: int) -> Any:
        found = right(self, scope, generation=generation)
        for tier, count in found.retired.items():
            found.freed[tier] += count
            found.retired[tier] = 0
        return found

    return [(TreeCutter, "preview", preview)]


@mutant()
def the_queue_takes_one_more() -> list[Patch]:
    """The queue accepts one request more than its limit."""
    right = Scheduler._refusal

    def refusal(self: Scheduler, request: Request) -> Finish | None:
        found = right(self, request)
        is_by_one = found is not None and found.status == 429 and len(self.waiting) == self.limits.max_queued
        return None if is_by_one else found

    return [(Scheduler, "_refusal", refusal)]


@mutant()
def running_requests_fill_the_queue() -> list[Patch]:
    """The limit of the queue also counts running requests."""
    right = Scheduler._refusal

    def refusal(self: Scheduler, request: Request) -> Finish | None:
        found = right(self, request)
        if found is None and len(self.waiting) + len(self.running) >= self.limits.max_queued:
            return Finish(type="abort", status=429)
        return found

    return [(Scheduler, "_refusal", refusal)]


@mutant(seed=1)
def the_newest_is_served_first() -> list[Patch]:
    """Within a priority, the request that arrived last is served first."""
    right = WaitingQueue.in_service_order

    def in_service_order(self: WaitingQueue, *args: Any) -> list[Request]:
        return sorted(right(self, *args), key=lambda r: (r.queue_key[0], -r.queue_key[1]))

    return [(WaitingQueue, "in_service_order", in_service_order)]


@mutant(seed=1)
def priorities_are_ignored() -> list[Patch]:
    """All requests are served in the order of their arrival."""
    right = Request.__init__

    def init(self: Request, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        self.queue_key = (0, self.queue_key[1])

    return [(Request, "__init__", init)]


@mutant(profile="training")
def retract_spares_one() -> list[Patch]:
    """A pause that retracts leaves one request its pages."""
    right = Scheduler.retract_all

    def retract_all(self: Scheduler) -> int:
        running = self.running._requests
        spared = running.pop() if running else None
        count = right(self)
        if spared is not None:
            running.append(spared)
        return count + (spared is not None)

    return [(Scheduler, "retract_all", retract_all)]


@mutant(profile="training")
def aborted_requests_are_not_counted() -> list[Patch]:
    """A pause or update that ends requests reports that it ended none."""
    right = ControlledEngine.abort_all

    def abort_all(self: ControlledEngine, message: str) -> int:
        right(self, message)
        return 0

    return [(ControlledEngine, "abort_all", abort_all)]


@mutant(profile="training")
def waiting_requests_count_as_frozen() -> list[Patch]:
    """A pause counts waiting requests as frozen."""
    right = Pause._apply

    def apply(self: Pause) -> int:
        is_freeze = self._message.mode == "in_place"
        return right(self) + (len(self._engine.scheduler.waiting) if is_freeze else 0)

    return [(Pause, "_apply", apply)]


@mutant(profile="tiers")
def splits_forget_the_offload() -> list[Patch]:
    """If a node is split during its copy, the upper part is copied again."""
    right = RadixTree.split

    def split(self: RadixTree, node: Any, num_pages: int) -> Any:
        upper = right(self, node, num_pages)
        upper.offload = None
        return upper

    return [(RadixTree, "split", split)]


@mutant(profile="failing")
def logits_that_are_not_finite_are_sampled() -> list[Patch]:
    """A request continues with a token sampled from logits with NaN."""
    right = Scheduler.collect

    def collect(self: Scheduler, plan: Any, result: Any) -> None:
        right(self, plan, structs.replace(result, is_finite=result.is_finite | True))

    return [(Scheduler, "collect", collect)]


@mutant(profile="failing", seed=4)
def what_is_not_finite_is_shared() -> list[Patch]:
    """A request whose logits have NaN leaves the pages of that step in the cache."""
    right = Scheduler._finish

    def finish(self: Scheduler, request: Request, finish: Finish) -> None:
        if finish is NOT_FINITE:
            request.progress.num_written = request.progress.num_computed
        right(self, request, finish)

    return [(Scheduler, "_finish", finish)]


@mutant(profile="store", seed=1)
def prefetches_are_joined_across_namespaces() -> list[Patch]:
    """A request waits for pages from the store that belong to another tenant."""
    right = Prefetch.covers

    def covers(self: Prefetch, namespace: Any, tokens: Any, *, first_page: int) -> bool:
        return right(self, self.namespace, tokens, first_page=first_page)

    return [(Prefetch, "covers", covers)]
