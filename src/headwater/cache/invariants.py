"""Audits the bookkeeping of the cache: for tests, the simulation, and the server's check at idle."""

import numpy as np

from headwater.cache.namespace import Tier
from headwater.cache.page_pool import Owner, PageIds, PagePool
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.radix_tree import Node, Run


def check_invariants(cache: PrefixCache) -> None:
    """Raise AssertionError if pages, tree, pins, leases and copies disagree. Walks everything."""
    holders = _Holders(cache)
    pins = holders.pins
    nodes = list(cache.tree.roots.values())
    for node in nodes:  # grows meanwhile
        nodes.extend(node.children.values())
    for tier, tier_pages in cache.tier_pages.items():
        tier_pages.pool.check()
        tree_runs = _tree_runs(cache, nodes, tier)
        num_evictable = 0
        for run in tree_runs:
            assert run.pins == pins.get(id(run), 0), "pins on a run differ from the leases and copies that hold it"
            if run.pins == 0:
                num_evictable += len(run.pages)
        assert num_evictable == tier_pages.num_evictable, (tier, num_evictable, tier_pages.num_evictable)
        in_tree = {id(run) for run in tree_runs}
        cut = [run for run in holders.pinned_runs(tier) if id(run) not in in_tree]
        for run in cut:
            assert run.is_retired and run.pins == pins.get(id(run), 0)
        held = {
            Owner.TREE: [run.pages for run in tree_runs],
            Owner.RETIRED: [run.pages for run in cut],
            Owner.PRIVATE: holders.private if tier is Tier.DEVICE else [],
            Owner.TRANSFER: holders.destinations(tier),
        }
        _check_owners(tier_pages.pool, held)


class _Holders:
    """The pins on runs, and the pages owned outside the tree: by leases, copies, holds and the store."""

    def __init__(self, cache: PrefixCache) -> None:
        self.private: list[PageIds] = []
        self.pins: dict[int, int] = {}  # by id of the run
        self._runs: dict[int, Run] = {}
        self._transfers = cache.lower.transfers.transfers if cache.lower.transfers else []
        for lease in cache.leases:
            self.private += [lease.private[: lease.num_private], *lease.superseded]
            total = 0
            for run in lease.run.chain() if lease.run else ():
                self._add(run)
                total += len(run.pages)
            assert total == lease.num_shared_pages, "a lease counts other pages than it pins"
        for transfer in self._transfers:
            for run in transfer.pinned():
                self._add(run)
        for hold in cache.lower.holds:
            for run in hold.held():
                self._add(run)
        self._arriving: list[PageIds] = []
        if cache.lower.storage is not None:
            for reading in cache.lower.storage.writer.reading:
                for run in reading.chain():
                    self._add(run)
            arriving = (prefetch.pages for prefetch in cache.lower.storage.reader.prefetches)
            self._arriving = [pages for pages in arriving if pages is not None]

    def pinned_runs(self, tier: Tier) -> list[Run]:
        return [run for run in self._runs.values() if run.tier is tier]

    def destinations(self, tier: Tier) -> list[PageIds]:
        copies = [transfer for transfer in self._transfers if transfer.destination_tier is tier]
        pages = [owned for transfer in copies for owned in transfer.owned]
        return pages + self._arriving if tier is Tier.HOST else pages

    def _add(self, run: Run) -> None:
        self.pins[id(run)] = self.pins.get(id(run), 0) + 1
        self._runs[id(run)] = run


def _tree_runs(cache: PrefixCache, nodes: list[Node], tier: Tier) -> list[Run]:
    found: list[Run] = []
    is_device = tier is Tier.DEVICE
    for node in nodes:
        above = node.parent
        assert above is None or node.runs or node.children, "an empty node stayed in the tree"
        run = node.runs.get(tier)
        if run is None:
            continue
        assert not run.is_retired and run.node is node and run.tier is tier
        assert run.arrival is None or run.pins, "pages that a copy still writes could be evicted"
        assert len(run.pages) * cache.page_size == len(node.tokens)
        if is_device and above is not None and above.parent is not None:
            assert run.parent is above.runs.get(tier), "a device run hangs below a gap"
        found.append(run)
    return found


def _check_owners(pool: PagePool, held: dict[Owner, list[PageIds]]) -> None:
    """Each owner holds as many pages as the pool counts for it, and the pool names the same owner for every page.

    Together this excludes a page that is held twice: another page would be missing.
    """
    owners = np.zeros(pool.capacity, dtype=np.uint8)
    for owner, pages in held.items():
        num_pages = 0
        if pages:
            together = np.concatenate(pages)
            owners[together] = int(owner)
            num_pages = len(together)
        assert num_pages == pool.count(owner), f"{owner.name}: {num_pages} held, {pool.count(owner)} counted"
    assert pool.has_owners(owners), "a page is held twice, or by another than its owner"
