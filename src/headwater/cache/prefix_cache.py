"""The prefix cache: leases on a radix tree over pages on several tiers, and retirement."""

from collections.abc import Iterable
from dataclasses import dataclass

from headwater.cache.host_tier import HostTier
from headwater.cache.lease import NO_LIMIT, Lease, PagePart, TokenSequence
from headwater.cache.lower_tiers import LowerTiers
from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.observer import CacheObserver
from headwater.cache.page_pool import Owner, PageIds, PagePool
from headwater.cache.prefetch import Prefetch
from headwater.cache.radix_tree import Node, RadixTree
from headwater.cache.retirement import Retirement
from headwater.cache.storage.tier import StorageTier
from headwater.cache.tier_pages import TierPages
from headwater.cache.transfer import Restore
from headwater.cache.tree_cutter import TreeCutter
from headwater.clock import Clock
from headwater.messages.base import TokenIds

MIN_PART_TOKENS = 4  # of a page; fewer are soon computed, and often only the beginning of a chat template


@dataclass(slots=True)
class CacheCounters:
    """Monotonic counts."""

    retired_tokens: int = 0
    retirements: int = 0


class PrefixCache:
    """KV pages shared by prefix. All methods run in the engine's loop and never block.

    Only owners free pages. A retirement cuts the pages in scope out of the tree. Unpinned pages are freed at once,
    pinned pages with their last pin, so a retirement is correct at any moment and under any load.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        page_bytes: int,
        clock: Clock,
        is_enabled: bool = True,
        host: HostTier | None = None,
        min_part_tokens: int = MIN_PART_TOKENS,
    ) -> None:
        self.page_size = page_size
        self.page_bytes = page_bytes
        self._clock = clock
        self.tree = RadixTree(page_size)
        self.tier_pages = {Tier.DEVICE: TierPages(Tier.DEVICE, self.tree, num_pages=num_pages)}
        self.generation = 0
        self.counters = CacheCounters()
        self.is_enabled = is_enabled
        self._min_part_tokens = min_part_tokens
        self.leases: set[Lease] = set()
        self.lower = LowerTiers(self.tree, self.tier_pages, self.leases, host=host if is_enabled else None)
        self._cutter = TreeCutter(self.tree, self.tier_pages, self.leases)
        self._device = self.tier_pages[Tier.DEVICE]

    @property
    def pool(self) -> PagePool:
        """The device pages."""
        return self._device.pool

    @property
    def version(self) -> int:
        """Grows with every change that may alter the result of `peek` for the device."""
        return self._device.version

    @property
    def num_available(self) -> int:
        """Device pages that `extend` could give out now, by eviction as well."""
        return self._device.num_available

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Enabled tiers, the device first."""
        return (*self.tier_pages, Tier.STORAGE) if self.lower.storage is not None else tuple(self.tier_pages)

    def observe(self, observer: CacheObserver) -> None:
        """Report to `observer`, from now on, which pages reach a tier and which leave it."""
        for tier_pages in self.tier_pages.values():
            tier_pages.observer = observer

    # --- for requests -------------------------------------------------------------------------------

    def acquire(
        self, namespace: Namespace, tokens: TokenSequence, *, max_cached_tokens: int, no_store: bool = False
    ) -> Lease:
        """Pin the longest prefix of `tokens` on the device, at most `max_cached_tokens` long, whole pages only.

        The caller owns the lease until `release`. With `no_store` its pages are never published.
        """
        root = self.tree.root(namespace)
        is_private = no_store or not self.is_enabled
        lease = Lease(root=root, tokens=tokens, publish_limit=0 if is_private else NO_LIMIT)
        root.num_leases += 1
        self.leases.add(lease)
        if self.lower.storage is not None:
            lease.generations = self.lower.storage.known_generations(namespace)
        if self.is_enabled:
            lease.node = self.tree.match(root, tokens.view(0, max_cached_tokens), tier=Tier.DEVICE)
            lease.run = lease.node.runs.get(Tier.DEVICE)
            for run in lease.run.chain() if lease.run else ():
                lease.num_shared_pages += len(run.pages)
                self._device.pin(run)
            lease.num_matched_pages = lease.num_shared_pages
            self.lower.saw_hit(lease.node)
        return lease

    def find_part(self, lease: Lease, *, max_cached_tokens: int) -> None:
        """Find a page of the tree that begins like the next page of `lease`, and pin it as `lease.part`.

        The caller extends the lease, and copies the page into the first new one with the step that it plans now.
        `settle` drops the pin when that step has ended. For a lease without private pages.
        """
        first = lease.num_shared_pages * self.page_size
        tokens = lease.tokens.view(first, min(first + self.page_size, max_cached_tokens))
        if not self.is_enabled or len(tokens) < self._min_part_tokens:
            return

        def may_copy(node: Node) -> bool:
            run = node.runs.get(Tier.DEVICE)
            # KV that a step may read unwaited, and that may be stored under the same counters as the rest of the page
            if run is None or run.arrival is not None:
                return False
            return lease.generations is None or run.generations == lease.generations

        min_tokens = self._min_part_tokens
        found = self.tree.longest_part(lease.node, tokens, min_tokens=min_tokens, may_copy=may_copy)
        if found is not None:
            node, num_tokens = found
            run = node.runs[Tier.DEVICE]
            lease.part = PagePart(run, page=int(run.pages[0]), num_tokens=num_tokens)
            for each in run.chain():
                self._device.pin(each)

    def drop_part(self, lease: Lease) -> None:
        """Unpin the part of a page that `lease` has found, if there is one. No step in flight copies it."""
        part, lease.part = lease.part, None
        for run in part.run.chain() if part is not None else ():
            self._device.unpin(run)

    def restore(self, lease: Lease, *, max_cached_tokens: int) -> Restore | None:
        """Begin to copy the next pages of the lease's prefix from the host to the device, if that is worth it.

        On success the restore owns the lease, and the caller acquires anew when the restore is done. Otherwise the
        caller keeps the lease.
        """
        transfers = self.lower.transfers
        if transfers is None:
            return None
        tokens = lease.tokens.view(lease.num_shared_pages * self.page_size, max_cached_tokens)
        nodes = self.tree.host_path(lease.node, tokens)
        if not nodes:
            return None
        if isinstance(nodes[0].restore, Restore):  # another request has begun it
            restore = nodes[0].restore
            if restore.was_dropped or not transfers.is_wanted(restore):
                return None
            self.release(lease)
            return restore
        num_tokens = sum(len(node.tokens) for node in nodes)
        if not self.lower.restore_cost.is_worth(num_tokens):
            return None
        restore = Restore(num_tokens=num_tokens, lease=lease)
        return restore if transfers.restore(nodes, restore) else None

    def prefetch(self, namespace: Namespace, tokens: TokenIds) -> Prefetch | None:
        """Begin to copy from storage to the host the pages of `tokens` that both tiers lack, if that is worth it."""
        if self.lower.storage is None:
            return None
        num_known = self.peek(namespace, tokens, tiers=tuple(self.tier_pages))
        return self.lower.storage.prefetch(namespace, tokens, num_known_tokens=num_known)

    def peek(self, namespace: Namespace, tokens: TokenIds, *, tiers: Iterable[Tier] = (Tier.DEVICE,)) -> int:
        """How many leading tokens of `tokens` are on any of `tiers` now. Pins and changes nothing."""
        node, num_tokens = self.tree.roots.get(namespace), 0
        while node is not None and len(tokens) - num_tokens >= self.page_size:
            found = self.tree.descend(node, tokens[num_tokens:])
            if found is None or found[0].runs.keys().isdisjoint(tiers):
                break
            node, num_pages = found
            num_tokens += num_pages * self.page_size
            if num_pages * self.page_size < len(node.tokens):
                break
        return num_tokens

    def extend(self, lease: Lease, num_pages: int) -> PageIds | None:
        """Add `num_pages` private pages, evicting others if needed, and return them; None if there are too few."""
        pages = self._device.take(num_pages, owner=Owner.PRIVATE)
        if pages is not None:
            lease.add_private(pages)
        return pages

    def publish(self, lease: Lease, num_tokens: int) -> list[tuple[int, PageIds]]:
        """Move the full pages among the first `num_tokens` tokens (whose KV is written) into the tree.

        Where the tree already has a page, the lease switches to it and sets its own copy aside until `settle`.
        Returns these changes of the page table as (first index, pages). Stops at pages that are still arriving, since
        a step of decodes would not wait for them.
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
            if child.runs[Tier.DEVICE].arrival is not None:
                break
            first = lease.num_shared_pages
            lease.superseded.append(lease.take_private(num_common))
            changes.append((first, self._switch(lease, child)))
        return changes

    def settle(self, lease: Lease) -> None:
        """Free the copies that `publish` set aside, and unpin `lease.part`. No step in flight may read them."""
        self.drop_part(lease)
        for pages in lease.superseded:
            self.pool.free(pages, giver=Owner.PRIVATE)
        lease.superseded.clear()

    def release(self, lease: Lease) -> None:
        """End the lease: drop its pins and free its private pages. No step in flight may use its pages."""
        assert not lease.is_released, "a lease is released exactly once"
        lease.is_released = True
        self.settle(lease)
        if lease.num_private:
            self.pool.free(lease.take_private(lease.num_private), giver=Owner.PRIVATE)
        for run in lease.run.chain() if lease.run else ():
            self._device.unpin(run)
        for retirement in lease.retirements:
            retirement.num_leases -= 1
        self.leases.remove(lease)
        lease.root.num_leases -= 1
        self.tree.drop_root_if_unused(lease.root)

    # --- every turn ---------------------------------------------------------------------------------

    def apply_finished(self) -> bool:
        """Process the copies that have ended, and start those that are due. Returns whether anything changed."""
        return self.lower.apply_finished(self.release)

    def is_awaited(self, prefetch: Prefetch) -> bool:
        """Whether the requests that wait for `prefetch` should not start yet."""
        return prefetch.is_awaited(self._clock.now())

    # --- for operators ------------------------------------------------------------------------------

    def detach_storage(self) -> StorageTier:
        """Stop using the store, and give up all copies in flight to and from it."""
        storage = self.lower.detach()
        self._report_cleared(Scope(tiers=frozenset({Tier.STORAGE})))
        return storage

    def retire(self, scope: Scope) -> Retirement:
        """Cut the pages in `scope` out of the tree, so that no later `acquire` can match them.

        Leases keep their pages in scope, but no longer publish them. Copies in flight to a tier in scope are dropped
        when they end. An empty scope is a no-op and makes no new generation.
        """
        retirement = Retirement(generation=self.generation)
        num_dropped = self.lower.retire(scope, retirement)
        self._cutter.cut(scope, retirement)
        num_pages = sum(retirement.freed.values()) + sum(retirement.retired.values())
        if num_pages or retirement.num_leases or num_dropped:
            self.generation += 1
            retirement.generation = self.generation
            self.counters.retirements += 1
            self.counters.retired_tokens += num_pages * self.page_size
        self._report_cleared(scope)
        return retirement

    def preview(self, scope: Scope) -> Retirement:
        """The outcome that `retire(scope)` would have now. Changes nothing."""
        return self._cutter.preview(scope, generation=self.generation)

    def _report_cleared(self, scope: Scope) -> None:
        if self._device.observer is not None:
            self._device.observer.cleared(self.generation, scope)

    # --- publishing ---------------------------------------------------------------------------------

    def _share(self, lease: Lease, node: Node) -> None:
        """Make the next private pages of the lease the device run of `node`, pinned by the lease."""
        pages = lease.take_private(len(node.tokens) // self.page_size)
        self._device.attach(node, pages, giver=Owner.PRIVATE, parent=lease.run, pins=1, generations=lease.generations)
        self._descend_to(lease, node)
        self.lower.saw_published(node)

    def _switch(self, lease: Lease, node: Node) -> PageIds:
        """Pin `node`'s device run as the next pages of the lease, and return these pages."""
        run = node.runs[Tier.DEVICE]
        self._device.pin(run)
        node.last_used = self.tree.tick
        self._descend_to(lease, node)
        return run.pages

    def _descend_to(self, lease: Lease, node: Node) -> None:
        lease.node = node
        lease.run = node.runs[Tier.DEVICE]
        lease.num_shared_pages += len(lease.run.pages)
