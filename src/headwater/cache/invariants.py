"""The books of the cache, audited: for tests, the simulation, and the server's check at idle."""

import numpy as np

from headwater.cache.namespace import Tier
from headwater.cache.page_pool import Owner, PageIds
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.radix_tree import Run


def check_invariants(cache: PrefixCache) -> None:
    """Raise AssertionError if pages, tree, pins and leases disagree. Walks everything."""
    cache.pool.check()
    pins: dict[int, int] = {}
    runs: dict[int, Run] = {}
    private: list[PageIds] = []
    for lease in cache.leases:
        private += [lease.private[: lease.num_private], *lease.superseded]
        total = 0
        for run in lease.run.chain() if lease.run else ():
            pins[id(run)] = pins.get(id(run), 0) + 1
            runs[id(run)] = run
            total += len(run.pages)
        assert total == lease.num_shared_pages, "a lease counts other pages than it pins"
    tree_pages: list[PageIds] = []
    num_evictable = 0
    for root in cache.tree.roots.values():
        for node in cache.tree.subtree(root):
            assert node.is_root or node.runs or node.children, "an empty node stayed in the tree"
            run = node.runs.get(Tier.DEVICE)
            if run is None:
                continue
            assert not run.is_retired
            assert run.node is node
            assert len(run.pages) * cache.page_size == len(node.tokens)
            assert run.pins == pins.pop(id(run), 0), "pins on a run differ from the leases that hold it"
            runs.pop(id(run), None)
            tree_pages.append(run.pages)
            num_evictable += len(run.pages) if run.pins == 0 else 0
    assert num_evictable == cache.num_evictable, (num_evictable, cache.num_evictable)
    for key, run in runs.items():  # pinned, not in the tree
        assert run.is_retired
        assert run.pins == pins[key]
    retired = [run.pages for run in runs.values()]
    for pages, owner in ((private, Owner.PRIVATE), (tree_pages, Owner.TREE), (retired, Owner.RETIRED)):
        flat = np.concatenate(pages) if pages else np.empty(0, dtype=np.int32)
        assert len(np.unique(flat)) == len(flat), f"a {owner.name} page is held twice"
        assert len(flat) == cache.pool.count(owner), (
            f"{owner.name}: {len(flat)} held, {cache.pool.count(owner)} counted"
        )
        assert all(cache.pool.owner_of(int(page)) == owner for page in flat)
