"""Mutants of prefix hits that end inside a page: what is copied, when, and how it is counted."""

from dataclasses import replace
from typing import Any

from headwater.cache.lease import Lease, PagePart
from headwater.cache.namespace import Tier
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.radix_tree import Node, RadixTree, Run
from headwater.scheduling.loading import LoadingRequests
from headwater.scheduling.plan_builder import PlanBuilder
from headwater.simulation.fakes.runner import FakeRunner
from headwater.simulation.mutants.registry import Patch, mutant


def _change_part(change: Any) -> list[Patch]:
    """Every part that a lease finds is changed, if `change(cache, part)` returns another one."""
    right = PrefixCache.find_part

    def find_part(self: PrefixCache, lease: Lease, *, max_cached_tokens: int) -> None:
        right(self, lease, max_cached_tokens=max_cached_tokens)
        if lease.part is not None:
            lease.part = change(self, lease.part)

    return [(PrefixCache, "find_part", find_part)]


@mutant()
def parts_come_from_the_end_of_a_run() -> list[Patch]:
    """The part of a page is copied out of the last page of its node."""
    return _change_part(lambda cache, part: replace(part, page=int(part.run.pages[-1])))


@mutant()
def parts_are_a_token_too_long() -> list[Patch]:
    """A request takes one token more of a page than it shares with it."""

    def longer(cache: PrefixCache, part: PagePart) -> PagePart:
        return replace(part, num_tokens=min(part.num_tokens + 1, cache.page_size - 1))

    return _change_part(longer)


@mutant(seed=5)
def parts_are_not_pinned() -> list[Patch]:
    """The page whose part is copied may be evicted and reused before its copy."""
    right_find, right_drop = PrefixCache.find_part, PrefixCache.drop_part

    def find_part(self: PrefixCache, lease: Lease, *, max_cached_tokens: int) -> None:
        right_find(self, lease, max_cached_tokens=max_cached_tokens)
        for run in lease.part.run.chain() if lease.part is not None else ():
            self.tier_pages[Tier.DEVICE].unpin(run)

    def drop_part(self: PrefixCache, lease: Lease) -> None:
        for run in lease.part.run.chain() if lease.part is not None else ():
            self.tier_pages[Tier.DEVICE].pin(run)
        right_drop(self, lease)

    return [(PrefixCache, "find_part", find_part), (PrefixCache, "drop_part", drop_part)]


@mutant()
def parts_stay_pinned() -> list[Patch]:
    """The page whose part was copied stays pinned after the step."""

    def drop_part(self: PrefixCache, lease: Lease) -> None:
        lease.part = None

    return [(PrefixCache, "drop_part", drop_part)]


@mutant()
def parts_are_not_copied() -> list[Patch]:
    """The copy of a part is forgotten, and the step reads whatever is in the page."""
    return [(PlanBuilder, "copy_part", lambda self, lease: None)]


@mutant()
def parts_are_copied_after_the_step() -> list[Patch]:
    """The copy of a part runs behind the step that reads it."""
    right_launch, right_copy = FakeRunner.launch, FakeRunner._copy_pages

    def launch(self: FakeRunner, plan: Any) -> Any:
        step = right_launch(self, plan)
        right_copy(self, plan, [self.kv[copy.source].copy() for copy in plan.page_copies], birth=self.num_steps)
        return step

    return [(FakeRunner, "launch", launch), (FakeRunner, "_copy_pages", lambda self, plan, taken, birth: {})]


@mutant(profile="flush")
def parts_are_found_before_and_copied_after_a_flush() -> list[Patch]:
    """The look-up of a part is kept for later requests, also when its page has been cut out of the tree."""
    right = RadixTree.longest_part
    kept: dict[tuple[int, bytes, int], tuple[Node, Run | None, int]] = {}

    def longest_part(self: RadixTree, node: Node, tokens: Any, **kwargs: Any) -> tuple[Node, int] | None:
        name = id(self), repr(node.namespace).encode() + self.path(node).tobytes() + tokens.tobytes(), len(tokens)
        if (known := kept.get(name)) is not None and not known[0].is_linked and known[1] is not None:
            known[0].runs[Tier.DEVICE] = known[1]
            return known[0], known[2]
        found = right(self, node, tokens, **kwargs)
        if found is not None:
            kept[name] = found[0], found[0].runs.get(Tier.DEVICE), found[1]
        return found

    return [(RadixTree, "longest_part", longest_part)]


@mutant(profile="tiers", seed=3)
def parts_of_arriving_pages_are_copied() -> list[Patch]:
    """A part is copied out of a page that a restore still writes."""
    right = RadixTree.longest_part

    def longest_part(self: RadixTree, node: Node, tokens: Any, *, min_tokens: int, may_copy: Any) -> Any:
        def may(child: Node) -> bool:
            run = child.runs.get(Tier.DEVICE)
            return may_copy(child) or (run is not None and run.arrival is not None)

        return right(self, node, tokens, min_tokens=min_tokens, may_copy=may)

    return [(RadixTree, "longest_part", longest_part)]


@mutant(profile="store", seed=30)
def parts_from_before_a_flush_of_the_store_are_stored() -> list[Patch]:
    """A page that begins with KV from before a flush of the store is stored after it."""
    right = RadixTree.longest_part

    def longest_part(self: RadixTree, node: Node, tokens: Any, *, min_tokens: int, may_copy: Any) -> Any:
        def may(child: Node) -> bool:
            run = child.runs.get(Tier.DEVICE)
            return run is not None and run.arrival is None

        return right(self, node, tokens, min_tokens=min_tokens, may_copy=may)

    return [(RadixTree, "longest_part", longest_part)]


@mutant()
def parts_are_counted_twice() -> list[Patch]:
    """An answer counts the tokens of a copied part twice."""
    right = LoadingRequests.attribute_hits

    def attribute_hits(self: LoadingRequests, request: Any, num_cached_tokens: int, counters: Any) -> None:
        part = request.lease.part
        right(self, request, num_cached_tokens + (part.num_tokens if part is not None else 0), counters)

    return [(LoadingRequests, "attribute_hits", attribute_hits)]


@mutant()
def parts_are_not_counted() -> list[Patch]:
    """An answer omits the tokens of a copied part."""
    right = LoadingRequests.attribute_hits

    def attribute_hits(self: LoadingRequests, request: Any, num_cached_tokens: int, counters: Any) -> None:
        part = request.lease.part
        right(self, request, num_cached_tokens - (part.num_tokens if part is not None else 0), counters)

    return [(LoadingRequests, "attribute_hits", attribute_hits)]
