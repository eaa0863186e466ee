"""Mutants of token paths: what is matched, published, limited and put together from pages."""

from typing import Any
from unittest.mock import patch

import numpy as np

from headwater.cache.lease import Lease
from headwater.cache.namespace import Scope
from headwater.cache.page_pool import PageIds
from headwater.cache.pins import PinBoard
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.radix_tree import Node, RadixTree
from headwater.cache.tier_pages import TierPages
from headwater.clock import Deadline
from headwater.control.at_once import AtOnce
from headwater.engine.steps import Steps
from headwater.scheduling.request import Request
from headwater.simulation.mutants.registry import Patch, mutant


@mutant()
def one_page_more_is_common() -> list[Patch]:
    """Two paths that differ inside a node are split one page too late."""
    right = RadixTree._num_common_pages

    def num_common_pages(self: RadixTree, left: Any, right_tokens: Any) -> int:
        most = min(len(left), len(right_tokens)) // self.page_size
        return min(right(self, left, right_tokens) + 1, most)

    return [(RadixTree, "_num_common_pages", num_common_pages)]


@mutant()
def the_whole_prompt_is_matched() -> list[Patch]:
    """A request takes all of its tokens from the cache and has none left to compute."""
    return [(Request, "num_matchable", property(lambda self: len(self.tokens)))]


@mutant()
def begun_pages_are_published() -> list[Patch]:
    """The last page of a request is shared before it is full."""
    right = PrefixCache.publish

    def publish(self: PrefixCache, lease: Lease, num_tokens: int) -> Any:
        full = -(-num_tokens // self.page_size) * self.page_size
        return right(self, lease, full if full <= len(lease.tokens) else num_tokens)

    return [(PrefixCache, "publish", publish)]


@mutant()
def page_tables_begin_at_the_lower_end() -> list[Patch]:
    """The runs of a path are joined in reverse order."""

    def page_table(self: Lease) -> PageIds:
        shared = [] if self.run is None else [run.pages for run in self.run.chain()]
        return np.concatenate([*shared, self.private[: self.num_private]]).astype(np.int32)

    return [(Lease, "page_table", page_table)]


@mutant()
def splits_forget_the_pins() -> list[Patch]:
    """The upper part of a split node counts as unpinned."""
    right = RadixTree.split

    def split(self: RadixTree, node: Node, num_pages: int) -> Node:
        upper = right(self, node, num_pages)
        for run in upper.runs.values():
            run.pins = 0
        return upper

    return [(RadixTree, "split", split)]


@mutant(profile="flush")
def prefixes_begin_a_page_early() -> list[Patch]:
    """A flush by prefix also takes the page before the one with the prefix's last token."""
    right = RadixTree.below

    def below(self: RadixTree, root: Node, prefix: Any, *, is_dry: bool = False) -> list[Node]:
        return right(self, root, prefix[: max(1, len(prefix) - self.page_size)], is_dry=is_dry)

    return [(RadixTree, "below", below)]


@mutant(profile="flush")
def retired_pages_that_come_back_are_not_counted() -> list[Patch]:
    """A drain does not notice pages that are freed."""
    right = TierPages.unpin

    def unpin(self: TierPages, run: Any) -> None:
        right(self, run)
        if run.is_retired and not run.pins:
            run.retirement.num_outstanding += len(run.pages)

    return [(TierPages, "unpin", unpin)]


@mutant(profile="training", seed=6)
def steps_in_flight_are_not_seen() -> list[Patch]:
    """The engine always reports that no step is in flight."""
    return [(Steps, "is_step_in_flight", lambda self: False)]


@mutant(profile="training")
def continuing_is_answered_and_not_done() -> list[Patch]:
    """A pause continues although its end is acknowledged."""
    right = AtOnce.look

    def look(self: AtOnce, moment: Any) -> Any:
        orders = self._engine.orders
        was_paused = orders.is_paused
        answer = right(self, moment)
        orders.is_paused = was_paused
        return answer

    return [(AtOnce, "look", look)]


@mutant(profile="training")
def other_weights_are_the_same_to_a_scope() -> list[Patch]:
    """A weight update cuts the namespaces of the new weights instead of the others."""
    right = Scope.has_namespace

    def has_namespace(self: Scope, namespace: Any) -> bool:
        if self.other_than_weights_id is None:
            return right(self, namespace)
        return self.other_than_weights_id == namespace.weights_id

    return [(Scope, "has_namespace", has_namespace)]


@mutant(profile="rough")
def pins_last_for_ever() -> list[Patch]:
    """A pin is held after its time."""
    right = PinBoard.advance

    def advance(self: PinBoard) -> None:
        with patch.object(Deadline, "has_passed", lambda self, clock: False):
            right(self)

    return [(PinBoard, "advance", advance)]
