"""The prefix cache: leases on a radix tree over a pool of device pages, and retirement."""

from collections.abc import Iterable
from dataclasses import dataclass

from headwater.cache.eviction import LruLeaves
from headwater.cache.lease import NO_LIMIT, Lease
from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.page_pool import Owner, PageIds, PagePool
from headwater.cache.radix_tree import Node, RadixTree, Run
from headwater.cache.retirement import Retirement
from headwater.cache.token_sequence import TokenSequence
from headwater.messages import TokenIds


@dataclass(slots=True)
class CacheCounters:
    """Monotonic counts, in tokens."""

    evicted_tokens: int = 0
    retired_tokens: int = 0
    retirements: int = 0


class PrefixCache:
    """KV pages shared by prefix. All methods run in the engine's loop and never block.

    Pages are freed by their owners only. A retirement cuts what is in scope out of the tree: unpinned pages
    are free at once, pinned ones with their last pin. So it is right at any moment, under any load.
    """

    def __init__(self, *, num_pages: int, page_size: int, page_bytes: int, is_enabled: bool = True) -> None:
        self.page_size = page_size
        self.page_bytes = page_bytes
        self.pools: dict[Tier, PagePool] = {Tier.DEVICE: PagePool(num_pages)}
        self.tree = RadixTree(page_size)
        self.generation = 0
        self.counters = CacheCounters()
        self.is_enabled = is_enabled
        self.num_evictable = 0  # unpinned device pages in the tree
        self.leases: set[Lease] = set()
        self._lru = LruLeaves(Tier.DEVICE)

    @property
    def pool(self) -> PagePool:
        """The device pages."""
        return self.pools[Tier.DEVICE]

    # --- what requests do ---------------------------------------------------------------------------

    def acquire(
        self, namespace: Namespace, tokens: TokenSequence, *, max_cached_tokens: int, no_store: bool = False
    ) -> Lease:
        """Pin the longest cached prefix of `tokens`, at most `max_cached_tokens` long, whole pages only.

        The lease is the caller's until `release`. With `no_store` nothing of it is ever published.
        """
        root = self.tree.root(namespace)
        is_private = no_store or not self.is_enabled
        lease = Lease(root=root, tokens=tokens, publish_limit=0 if is_private else NO_LIMIT)
        root.num_leases += 1
        self.leases.add(lease)
        if self.is_enabled:
            lease.node = self.tree.match(root, tokens.view(0, max_cached_tokens), tier=Tier.DEVICE)
            lease.run = lease.node.runs.get(Tier.DEVICE)
            lease.num_shared_pages = self._pin(lease.run)
            lease.num_matched_pages = lease.num_shared_pages
        return lease

    def peek(self, namespace: Namespace, tokens: TokenIds) -> int:
        """How many leading tokens of `tokens` the device holds now. Pins and changes nothing."""
        node, num_tokens = self.tree.roots.get(namespace), 0
        while node is not None and len(tokens) - num_tokens >= self.page_size:
            found = self.tree.descend(node, tokens[num_tokens:])
            if found is None or Tier.DEVICE not in found[0].runs:
                break
            node, num_pages = found
            num_tokens += num_pages * self.page_size
            if num_pages * self.page_size < len(node.tokens):
                break
        return num_tokens

    def extend(self, lease: Lease, num_pages: int) -> PageIds | None:
        """`num_pages` more private pages, evicting if need be; None if there are too few."""
        if self.pool.num_free < num_pages:
            if self.num_available < num_pages:
                return None
            self._evict(num_pages - self.pool.num_free)
        pages = self.pool.take(num_pages, owner=Owner.PRIVATE)
        if pages is not None:
            lease.add_private(pages)
        return pages

    def publish(self, lease: Lease, num_tokens: int) -> list[tuple[int, PageIds]]:
        """Move the full pages among the first `num_tokens` tokens (whose KV is written) into the tree.

        Where the tree already has a page, the lease goes over to it and sets its own copy aside until
        `settle`. Returns these changes of the page table as (first index, pages).
        """
        limit = min(num_tokens // self.page_size, lease.publish_limit)
        changes: list[tuple[int, PageIds]] = []
        while lease.num_shared_pages < limit:
            rest = lease.tokens.view(lease.num_shared_pages * self.page_size, limit * self.page_size)
            found = self.tree.descend(lease.node, rest)
            if found is None:
                self._share(lease, self.tree.add_child(lease.node, rest))
                break
            child, num_common = found
            if num_common * self.page_size < len(child.tokens):
                child = self.tree.split(child, num_common)
            if Tier.DEVICE not in child.runs:
                self._share(lease, child)
                continue
            first = lease.num_shared_pages
            lease.superseded.append(lease.take_private(num_common))
            changes.append((first, self._go_over(lease, child)))
        return changes

    def settle(self, lease: Lease) -> None:
        """Free the copies that `publish` set aside: no step that reads them is in flight any more."""
        for pages in lease.superseded:
            self.pool.free(pages, giver=Owner.PRIVATE)
        lease.superseded.clear()

    def release(self, lease: Lease) -> None:
        """End the lease: private pages are free, pins let go. No step that uses its pages is in flight."""
        assert not lease.is_released, "a lease is released exactly once"
        lease.is_released = True
        self.settle(lease)
        if lease.num_private:
            self.pool.free(lease.take_private(lease.num_private), giver=Owner.PRIVATE)
        self._unpin(lease.run)
        for retirement in lease.retirements:
            retirement.num_leases -= 1
        self.leases.remove(lease)
        lease.root.num_leases -= 1
        self.tree.drop_root_if_unused(lease.root)

    # --- what operators do --------------------------------------------------------------------------

    def retire(self, scope: Scope) -> Retirement:
        """Cut what is in `scope` out of the tree, so that no later `acquire` can match it.

        Leases that hold pages in scope keep them, but publish none of them any more. A scope that holds
        nothing is a no-op and makes no new generation.
        """
        retirement = Retirement(generation=self.generation)
        for root in [r for ns, r in self.tree.roots.items() if scope.has_namespace(ns)]:
            for node in self._tops(root, scope):
                self._cut(node, scope.tiers, retirement)
            self.tree.drop_root_if_unused(root)
        if Tier.DEVICE in scope.tiers:
            self._limit_leases(scope, retirement)
        if any(retirement.freed.values()) or any(retirement.retired.values()) or retirement.num_leases:
            self.generation += 1
            retirement.generation = self.generation
            self.counters.retirements += 1
        return retirement

    def preview(self, scope: Scope) -> Retirement:
        """What `retire(scope)` would do, without doing it."""
        preview = Retirement(generation=self.generation)
        for root in [r for ns, r in self.tree.roots.items() if scope.has_namespace(ns)]:
            tops = [root] if scope.prefix is None else self.tree.below(root, scope.prefix, is_dry=True)
            for top in tops:
                spared = self._num_pages_above(top, scope)
                for node in self.tree.subtree(top):
                    for tier, run in node.runs.items():
                        if tier in scope.tiers:
                            side = preview.retired if run.pins else preview.freed
                            side[tier] += len(run.pages) - (spared if node is top else 0)
        preview.num_leases = sum(1 for lease in self.leases if self._limit_of(lease, scope) is not None)
        preview.num_outstanding = sum(preview.retired.values())
        return preview

    @property
    def num_available(self) -> int:
        """Device pages that `extend` could hand out now."""
        return self.pool.num_free + self.num_evictable

    def in_flight(self) -> dict[str, int]:
        """The cache itself holds no work across turns: leases belong to requests, copies to transfers."""
        return {}

    # --- pins ---------------------------------------------------------------------------------------

    def _pin(self, run: Run | None) -> int:
        num_pages = 0
        for each in run.chain() if run else ():
            num_pages += len(each.pages)
            self._pin_one(each)
        return num_pages

    def _pin_one(self, run: Run) -> None:
        if run.pins == 0 and run.tier is Tier.DEVICE:
            self.num_evictable -= len(run.pages)
        run.pins += 1

    def _unpin(self, run: Run | None) -> None:
        for each in run.chain() if run else ():
            each.pins -= 1
            assert each.pins >= 0
            if each.pins:
                continue
            if each.is_retired:
                assert each.retirement is not None
                self.pools[each.tier].free(each.pages, giver=Owner.RETIRED)
                each.retirement.num_outstanding -= len(each.pages)
            elif each.tier is Tier.DEVICE:
                self.num_evictable += len(each.pages)
                each.node.last_used = self.tree.tick
                self._lru.offer(each.node)

    def _share(self, lease: Lease, node: Node) -> None:
        """The lease's next private pages become `node`'s device run, pinned by the lease."""
        pages = lease.take_private(len(node.tokens) // self.page_size)
        self.pool.hand_over(pages, giver=Owner.PRIVATE, taker=Owner.TREE)
        node.runs[Tier.DEVICE] = Run(node=node, tier=Tier.DEVICE, pages=pages, parent=lease.run, pins=1)
        self._descend_to(lease, node)

    def _go_over(self, lease: Lease, node: Node) -> PageIds:
        """The lease pins `node`'s device run as its next pages, which are returned."""
        run = node.runs[Tier.DEVICE]
        self._pin_one(run)
        node.last_used = self.tree.tick
        self._descend_to(lease, node)
        return run.pages

    def _descend_to(self, lease: Lease, node: Node) -> None:
        lease.node = node
        lease.run = node.runs[Tier.DEVICE]
        lease.num_shared_pages += len(lease.run.pages)

    # --- cutting ------------------------------------------------------------------------------------

    def _evict(self, num_pages: int) -> None:
        while num_pages > 0:
            node = self._lru.pop()
            assert node is not None, "num_evictable promised pages that no leaf has"
            run = node.runs.pop(Tier.DEVICE)
            self.pool.free(run.pages, giver=Owner.TREE)
            self.num_evictable -= len(run.pages)
            self.counters.evicted_tokens += len(run.pages) * self.page_size
            num_pages -= len(run.pages)
            self._prune(node)

    def _prune(self, node: Node) -> None:
        """Remove a node that no tier holds any more; its parent may be the next to evict."""
        parent = node.parent
        if parent is None:
            return
        if not node.runs and not node.children:
            self.tree.unlink(node)
        if parent.is_root:
            self.tree.drop_root_if_unused(parent)
        else:
            self._lru.offer(parent)

    def _tops(self, root: Node, scope: Scope) -> Iterable[Node]:
        if scope.prefix is None:
            return list(root.children.values())
        return self.tree.below(root, scope.prefix)

    def _cut(self, top: Node, tiers: frozenset[Tier], retirement: Retirement) -> None:
        nodes = list(self.tree.subtree(top))
        for node in nodes:
            for tier in tiers & node.runs.keys():
                self._retire_run(node.runs.pop(tier), retirement)
        for node in reversed(nodes):  # children first
            if not node.runs and not node.children:
                self.tree.unlink(node)
        if top.parent is not None and not top.parent.is_root:
            self._lru.offer(top.parent)

    def _retire_run(self, run: Run, retirement: Retirement) -> None:
        num_pages = len(run.pages)
        self.counters.retired_tokens += num_pages * self.page_size
        if run.pins == 0:
            self.pools[run.tier].free(run.pages, giver=Owner.TREE)
            self.num_evictable -= num_pages if run.tier is Tier.DEVICE else 0
            retirement.freed[run.tier] += num_pages
            return
        self.pools[run.tier].hand_over(run.pages, giver=Owner.TREE, taker=Owner.RETIRED)
        run.is_retired = True
        run.retirement = retirement
        retirement.retired[run.tier] += num_pages
        retirement.num_outstanding += num_pages

    def _limit_leases(self, scope: Scope, retirement: Retirement) -> None:
        for lease in self.leases:
            limit = self._limit_of(lease, scope)
            if limit is not None:
                lease.publish_limit = min(lease.publish_limit, limit)
                lease.retirements.append(retirement)
                retirement.num_leases += 1

    def _limit_of(self, lease: Lease, scope: Scope) -> int | None:
        """The publish limit that `scope` sets `lease`; None if it holds no page in scope."""
        if not scope.has_namespace(lease.root.namespace):
            return None
        limit = scope.limit_for(lease.tokens.view(), self.page_size)
        return None if limit is None or lease.num_pages <= limit else limit

    def _num_pages_above(self, top: Node, scope: Scope) -> int:
        """Leading pages of `top` that lie above the scope; not 0 only where a retirement would split it."""
        if scope.prefix is None:
            return 0
        depth, node = 0, top.parent
        while node is not None:
            depth += len(node.tokens) // self.page_size
            node = node.parent
        return max(0, scope.first_page(self.page_size) - depth)
