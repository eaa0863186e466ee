"""The pages of one tier: its pool, the runs of the tree that hold pages, and which run is evicted next."""

from collections.abc import Iterable

import numpy as np

from headwater.cache.eviction import LruLeaves
from headwater.cache.namespace import Tier
from headwater.cache.observer import CacheObserver
from headwater.cache.page_pool import Owner, PageIds, PagePool
from headwater.cache.radix_tree import Node, RadixTree, Run
from headwater.cache.retirement import Retirement
from headwater.cache.statistics.residency import Residency


def count_use(runs: Iterable[Run]) -> None:
    """A request starts with these runs, or a copy does: for the sample of the metrics."""
    for run in runs:
        if run.stay is not None:
            run.stay.used(len(run.pages))


class TierPages:
    """Attaches, pins, cuts and evicts runs. Every change of a page's owner goes through its pool."""

    def __init__(self, tier: Tier, tree: RadixTree, *, num_pages: int) -> None:
        self.tier = tier
        self.pool = PagePool(num_pages)
        self.num_evictable = 0  # unpinned pages in the tree
        self.num_evicted = 0  # pages, ever
        self.num_retired_free = 0  # pages, ever: unpinned when they were retired
        self.num_retired_held = 0  # the same, pinned: freed with their last pin
        self.version = 0  # grows with every change of the tree's runs on this tier
        self.observer: CacheObserver | None = None
        self.residency: Residency | None = None
        self._tree = tree
        self._lru = LruLeaves(tier)

    @property
    def num_available(self) -> int:
        """Pages that `take` could give out now."""
        return self.pool.num_free + self.num_evictable

    def take(self, num_pages: int, *, owner: Owner) -> PageIds | None:
        """`num_pages` pages for `owner`, evicting others if needed; None if there are too few."""
        if self.num_available < num_pages:
            return None
        if self.pool.num_free < num_pages:
            self._evict(num_pages - self.pool.num_free)
        return self.pool.take(num_pages, owner=owner)

    def attach(
        self,
        node: Node,
        pages: PageIds,
        *,
        giver: Owner,
        parent: Run | None,
        pins: int,
        generations: tuple[int, ...] | None,
    ) -> Run:
        """Make `pages`, owned by `giver` until now, the run of `node` on this tier.

        `generations`: the store's counters when what they hold was computed.
        """
        assert self.tier not in node.runs
        self.version += 1
        self.pool.hand_over(pages, giver=giver, taker=Owner.TREE)
        run = Run(node=node, tier=self.tier, pages=pages, parent=parent, pins=pins)
        run.generations = generations
        if self.residency is not None:
            run.stay = self.residency.begin()
        node.runs[self.tier] = run
        if pins == 0:
            self.num_evictable += len(pages)
            self._lru.offer(node)
        if self.observer is not None:
            self.observer.stored(node, self.tier)
        return run

    def pin(self, run: Run) -> None:
        if run.pins == 0:
            self.num_evictable -= len(run.pages)
        run.pins += 1

    def unpin(self, run: Run) -> None:
        """Drop one pin. The last one frees a retired run, and makes any other run evictable."""
        run.pins -= 1
        assert run.pins >= 0
        if run.pins:
            return
        if run.is_retired:
            assert run.retirement is not None
            self.pool.free(run.pages, giver=Owner.RETIRED)
            run.retirement.num_outstanding -= len(run.pages)
        else:
            if run.stay is not None:
                run.stay.released()
            self.num_evictable += len(run.pages)
            run.node.last_used = max(run.node.last_used, self._tree.tick)
            self._lru.offer(run.node)

    def cut(self, nodes: Iterable[Node], retirement: Retirement) -> None:
        """Retire the runs of `nodes`: free unpinned runs now, and pinned runs with their last pin.

        One call handles all nodes, because a flush under load cuts hundreds of runs while the next step waits.
        """
        self.version += 1
        runs = [node.runs.pop(self.tier) for node in nodes if self.tier in node.runs]
        free, held = [run for run in runs if not run.pins], [run for run in runs if run.pins]
        if self.observer is not None:
            for run in runs:
                self.observer.removed(run.node, self.tier, reason="retired")
        for run in held:
            run.is_retired = True
            run.retirement = retirement
        if free:
            pages = np.concatenate([run.pages for run in free])
            self.pool.free(pages, giver=Owner.TREE)
            self.num_evictable -= len(pages)
            retirement.freed[self.tier] += len(pages)
            self.num_retired_free += len(pages)
        if held:
            pages = np.concatenate([run.pages for run in held])
            self.pool.hand_over(pages, giver=Owner.TREE, taker=Owner.RETIRED)
            retirement.retired[self.tier] += len(pages)
            retirement.num_outstanding += len(pages)
            self.num_retired_held += len(pages)

    def offer(self, node: Node) -> None:
        """Consider `node` for eviction: the child that prevented it may be gone."""
        self._lru.offer(node)

    def least_recently_used(self, num_pages: int) -> list[Node]:
        """Unpinned leaves with at least `num_pages` pages together, in the order of eviction. Changes nothing."""
        found: list[Node] = []
        while num_pages > 0 and (node := self._lru.pop()) is not None:
            found.append(node)
            num_pages -= len(node.runs[self.tier].pages)
        for node in found:
            self._lru.offer(node)
        return found

    def _evict(self, num_pages: int) -> None:
        self.version += 1
        while num_pages > 0:
            node = self._lru.pop()
            if node is None:  # on the host an unpinned run may lie above a pinned one, so it is no leaf
                assert self.tier is Tier.HOST, "num_evictable promised pages that no leaf has"
                return
            surplus = len(node.runs[self.tier].pages) - num_pages
            if surplus > 0:  # evict the tail only
                self._tree.split(node, surplus)
            run = node.runs.pop(self.tier)
            if run.stay is not None:
                run.stay.evicted(len(run.pages))
            if self.observer is not None:
                self.observer.removed(node, self.tier, reason="evicted")
            self.pool.free(run.pages, giver=Owner.TREE)
            self.num_evictable -= len(run.pages)
            self.num_evicted += len(run.pages)
            num_pages -= len(run.pages)
            parent = node.parent
            self._tree.prune(node)
            if parent is not None:
                self._lru.offer(parent)
