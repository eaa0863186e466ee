"""Audits the bookkeeping of the cache: for tests, the simulation, and the server's check at idle."""

from collections.abc import Iterable

import numpy as np

from headwater.cache.namespace import Tier
from headwater.cache.page_pool import Owner, PageIds, PagePool
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.radix_tree import Run


def check_invariants(cache: PrefixCache) -> None:
    """Raise AssertionError if pages, tree, pins, leases and copies disagree. Walks everything."""
    holders = _Holders(cache)
    pins = holders.pins
    found = _runs_in_tree(cache)
    for tier, tier_pages in cache.tier_pages.items():
        tier_pages.pool.check()
        num_evictable = 0
        in_tree: set[int] = set()
        tree_pages: list[PageIds] = []
        for run in found[tier]:
            name = id(run)
            assert run.pins == pins.get(name, 0), "pins on a run differ from the leases and copies that hold it"
            if not run.pins:
                num_evictable += len(run.pages)
            in_tree.add(name)
            tree_pages.append(run.pages)
        assert num_evictable == tier_pages.num_evictable, (tier, num_evictable, tier_pages.num_evictable)
        cut = [run for run in holders.pinned_runs(tier) if id(run) not in in_tree]
        for run in cut:
            assert run.is_retired and run.pins == pins.get(id(run), 0)
        held = {
            Owner.TREE: tree_pages,
            Owner.RETIRED: [run.pages for run in cut],
            Owner.PRIVATE: holders.private if tier is Tier.DEVICE else [],
            Owner.TRANSFER: holders.destinations(tier),
        }
        _check_owners(tier_pages.pool, held)


class _Holders:
    """The pins on runs, and the pages owned outside the tree: by leases, copies, holds and the store."""

    def __init__(self, cache: PrefixCache) -> None:
        lower = cache.lower
        self.private: list[PageIds] = []
        self.pins: dict[int, int] = {}  # by id of the run
        self._runs: dict[int, Run] = {}
        self._transfers = lower.transfers.transfers if lower.transfers else []
        for lease in cache.leases:
            self.private.append(lease.private[: lease.num_private])
            self.private += lease.superseded
            num_pages = self._pin(lease.run.chain()) if lease.run else 0
            if lease.part is not None:
                self._pin(lease.part.run.chain())
            assert num_pages == lease.num_shared_pages, "a lease counts other pages than it pins"
        for transfer in self._transfers:
            self._pin(transfer.pinned())
        for hold in lower.holds:
            self._pin(hold.held())
        self._arriving: list[PageIds] = []
        if lower.storage is not None:
            for reading in lower.storage.writer.reading:
                self._pin(reading.chain())
            arriving = (prefetch.pages for prefetch in lower.storage.reader.prefetches)
            self._arriving = [pages for pages in arriving if pages is not None]

    def pinned_runs(self, tier: Tier) -> list[Run]:
        return [run for run in self._runs.values() if run.tier is tier]

    def destinations(self, tier: Tier) -> list[PageIds]:
        copies = [transfer for transfer in self._transfers if transfer.destination_tier is tier]
        pages = [owned for transfer in copies for owned in transfer.owned]
        return pages + self._arriving if tier is Tier.HOST else pages

    def _pin(self, runs: Iterable[Run]) -> int:
        """Count a pin on each of `runs`; returns their pages."""
        pins, num_pages = self.pins, 0
        for run in runs:
            name = id(run)
            pins[name] = pins.get(name, 0) + 1
            self._runs[name] = run
            num_pages += len(run.pages)
        return num_pages


def _runs_in_tree(cache: PrefixCache) -> dict[Tier, list[Run]]:
    """Every run that the tree names, by tier, each checked against its node."""
    found: dict[Tier, list[Run]] = {tier: [] for tier in cache.tier_pages}
    page_size = cache.page_size
    nodes = list(cache.tree.roots.values())
    for node in nodes:  # grows meanwhile
        nodes.extend(node.children.values())
        above, runs = node.parent, node.runs
        assert above is None or runs or node.children, "an empty node stayed in the tree"
        for tier, run in runs.items():
            assert not run.is_retired and run.node is node and run.tier is tier
            assert run.arrival is None or run.pins, "pages that a copy still writes could be evicted"
            assert len(run.pages) * page_size == len(node.tokens)
            if tier is Tier.DEVICE and above is not None and above.parent is not None:
                assert run.parent is above.runs.get(tier), "a device run hangs below a gap"
            found[tier].append(run)
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
