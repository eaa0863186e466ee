"""Host memory and storage below the device: copies between tiers, backups, holds, and the attached store."""

from collections.abc import Callable

from headwater.cache.host_hold import HostHold
from headwater.cache.host_tier import HostTier, RestorePolicy, WritePolicy
from headwater.cache.lease import Lease
from headwater.cache.namespace import Scope, Tier
from headwater.cache.radix_tree import Node, RadixTree
from headwater.cache.retirement import RaisedScope, Retirement
from headwater.cache.storage.generations import UnacknowledgedFlushes
from headwater.cache.storage.tier import StorageTier
from headwater.cache.tier_pages import TierPages
from headwater.cache.transfer_engine import TransferEngine

_WEIGHT = 0.2  # of a new sample in the running averages
_FORGET = 0.95  # of the average of restores at each refusal
_OVERHEAD_S = 0.001  # of a restore: its request starts at least a turn later


class RestoreCost:
    """Decides whether restores are worth their time, by running averages of the seconds per token of both ways.

    While either is unknown, restores win. Each refusal lowers the average of restores by a little, so that a few slow
    copies do not end restores forever.
    """

    def __init__(self, *, min_tokens: int, policy: RestorePolicy) -> None:
        self._min_tokens = min_tokens
        self._policy = policy
        self._prefill_s: float | None = None
        self._restore_s: float | None = None

    def saw_prefill(self, num_tokens: int, seconds: float) -> None:
        self._prefill_s = _average(self._prefill_s, seconds / num_tokens)

    def saw_restore(self, num_tokens: int, seconds: float) -> None:
        self._restore_s = _average(self._restore_s, seconds / num_tokens)

    def is_worth(self, num_tokens: int) -> bool:
        """Whether a request should wait for `num_tokens` to be restored."""
        if num_tokens < self._min_tokens:
            return False
        if self._policy is RestorePolicy.ALWAYS or self._prefill_s is None or self._restore_s is None:
            return True
        if num_tokens * self._restore_s + _OVERHEAD_S < num_tokens * self._prefill_s:
            return True
        self._restore_s *= _FORGET
        return False


class LowerTiers:
    """The enabled tiers below the device. All methods run in the engine's loop and never block.

    `host` and `transfers` are None without a host tier, `storage` without an attached store.
    """

    def __init__(
        self, tree: RadixTree, tier_pages: dict[Tier, TierPages], leases: set[Lease], *, host: HostTier | None
    ) -> None:
        """Adds the host tier's pages to `tier_pages`."""
        self.host = host
        self.write_policy = host.policy if host is not None else WritePolicy.WRITE_THROUGH  # may change at any time
        self.restore_cost = RestoreCost(
            min_tokens=host.min_restore_tokens if host else 0,
            policy=host.restore_policy if host else RestorePolicy.AUTO,
        )
        self.holds: set[HostHold] = set()
        self.storage: StorageTier | None = None
        self.transfers: TransferEngine | None = None
        self._tree = tree
        self._tier_pages = tier_pages
        self._leases = leases
        self._unacknowledged = UnacknowledgedFlushes()
        if host is not None:
            tier_pages[Tier.HOST] = TierPages(Tier.HOST, tree, num_pages=host.num_pages)
            self.transfers = TransferEngine(
                tree,
                tier_pages,
                host.copier,
                max_pages_in_flight=host.max_pages_in_flight,
                is_host_read=lambda: self.storage is not None and bool(self.storage.in_flight()),
            )

    # --- every turn ---------------------------------------------------------------------------------

    def apply_finished(self, release: Callable[[Lease], None]) -> bool:
        """Process the copies that have ended, and start those that are due. Returns whether anything changed.

        `release` ends the leases of finished restores.
        """
        if self.transfers is None:
            return False
        finished = self.transfers.apply_finished(num_leases=len(self._leases))
        for transfer, nodes in finished:
            if self.storage is not None and transfer.destination_tier is Tier.HOST:
                for node in nodes:
                    self.storage.persist(node)
            if transfer.destination_tier is Tier.DEVICE and not transfer.handle.has_failed:
                self.restore_cost.saw_restore(len(transfer.pages) * self._tree.page_size, transfer.handle.took_s)
        for restore in (restores := self.transfers.take_finished_restores()):
            if restore.lease is not None:
                release(restore.lease)
                restore.lease = None
        has_ended = self.storage.advance() if self.storage is not None else False
        self.transfers.start_waiting()
        if self.write_policy is WritePolicy.WRITE_BACK:
            self._write_back()
        return bool(finished or restores) or has_ended

    @property
    def needs_polling(self) -> bool:
        """Whether copies are in flight whose end sends no message."""
        return self.is_copying or (self.storage is not None and self.storage.needs_polling)

    def in_flight(self) -> dict[str, int]:
        """Copies between tiers, by kind. Leases are not counted here, since they belong to requests."""
        found = self.transfers.in_flight() if self.transfers is not None else {}
        if self.storage is not None:
            found |= self.storage.in_flight()
        return found

    # --- copies to the host -------------------------------------------------------------------------

    def saw_published(self, node: Node) -> None:
        """A lease has published `node`, with pages on the device."""
        if self.transfers is not None and self.write_policy is WritePolicy.WRITE_THROUGH:
            self.transfers.offload(node)

    def saw_hit(self, node: Node) -> None:
        """A request has matched the path to `node`."""
        if self.transfers is not None and self.write_policy is WritePolicy.WRITE_THROUGH_SELECTIVE:
            for each in self._tree.path_to(node):
                self.transfers.offload(each)

    def _write_back(self) -> None:
        """Copy the runs that would be evicted next, while free pages remain.

        A run is copied at most once after each use: on a small host copies evict one another and would never end.
        """
        assert self.transfers is not None
        device = self._tier_pages[Tier.DEVICE]
        low_water = device.pool.capacity // 8
        for node in device.least_recently_used(max(0, low_water - device.pool.num_free)):
            if node.written_back_at != node.last_used:
                node.written_back_at = node.last_used
                self.transfers.offload(node)

    @property
    def is_copying(self) -> bool:
        """Whether copies between device and host are in flight, which hold pages of both."""
        return self.transfers is not None and self.transfers.num_in_flight > 0

    @property
    def is_parking(self) -> bool:
        """Whether device pages become free as soon as running copies to the host are done."""
        return self.transfers is not None and self.transfers.is_parking

    def back_up(self, lease: Lease) -> int:
        """Copy the lease's shared pages to the host; returns how many are there or are being copied.

        For a request that is parked: it finds its pages again on the host.
        """
        if self.transfers is None:
            return 0
        num_pages = 0
        for node in self._tree.path_to(lease.node):  # from the top: pages below a gap are of no use
            self.transfers.offload(node, is_parking=True)
            if Tier.HOST in node.runs or node.offload is not None:
                num_pages += len(node.tokens) // self._tree.page_size
        return num_pages

    # --- holds --------------------------------------------------------------------------------------

    def hold(self) -> HostHold:
        """A new hold, without pins. The caller owns it until `release_hold`."""
        hold = HostHold()
        self.holds.add(hold)
        return hold

    def extend_hold(self, hold: HostHold, lease: Lease, *, may_copy: bool) -> None:
        """Pin the host pages of the lease's path; with `may_copy` begin to copy the missing ones there."""
        assert self.transfers is not None
        for node in hold.take(self._tree.path_to(lease.node), self._tier_pages[Tier.HOST]):
            if may_copy:
                self.transfers.offload(node)

    def release_hold(self, hold: HostHold) -> None:
        self.holds.remove(hold)
        hold.release(self._tier_pages[Tier.HOST])

    # --- storage and flushes ------------------------------------------------------------------------

    def attach(self, storage: StorageTier) -> None:
        """Use `storage` from now on. Requires a host tier, and that no store is attached."""
        assert self.storage is None and self.host is not None
        self.storage = storage
        storage.generations.take_over(self._unacknowledged.take(storage.place))
        if self._tree.roots:  # so that pages of requests that start from now on can be stored
            storage.generations.ask(list(self._tree.roots))

    def detach(self) -> StorageTier:
        """Stop using the store, and give up all copies in flight to and from it."""
        assert self.storage is not None
        storage, self.storage = self.storage, None
        storage.detach()
        self._unacknowledged.left_by(storage.place, storage.generations.unacknowledged)
        for root in list(self._tree.roots.values()):
            for node in self._tree.subtree(root):
                for run in node.runs.values():
                    run.generations = None  # they are counters of the old store
        if self.transfers is not None:
            self.transfers.forget_generations()
        for lease in self._leases:
            lease.generations = None
        return storage

    def retire(self, scope: Scope, retirement: Retirement) -> int:
        """Drop copies in flight to a tier in `scope`, and retire it in the store; returns the number of such copies."""
        num_dropped = self.transfers.mark_retired(scope) if self.transfers else 0
        if self.storage is not None:
            num_dropped += self.storage.retire(scope)
            if Tier.STORAGE in scope.tiers:
                retirement.raised = self.storage.raise_generation(scope)
        elif Tier.STORAGE in scope.tiers:  # detached while the flush waited
            retirement.raised = RaisedScope(scope)
            self._unacknowledged.add(retirement.raised)
        return num_dropped


def _average(before: float | None, sample: float) -> float:
    return sample if before is None else before + _WEIGHT * (sample - before)
