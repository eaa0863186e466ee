"""The only mover of pages between device and host. Owns every copy in flight and its destination pages."""

from collections.abc import Callable

import numpy as np

from headwater.cache.copier import EarlyCopyHandle, PageCopier
from headwater.cache.namespace import Scope, Tier
from headwater.cache.page_pool import Owner, PageIds
from headwater.cache.radix_tree import Node, RadixTree, Run
from headwater.cache.tier_pages import TierPages, count_use
from headwater.cache.transfer import Restore, Transfer, TransferCounters


class TransferEngine:
    """Starts copies, and once a turn processes those that are done. Never blocks.

    A copy in flight pins its source runs, and owns or pins its destination pages. So no retirement and no eviction can
    free the pages of either side while the copy uses them.
    """

    def __init__(
        self,
        tree: RadixTree,
        tier_pages: dict[Tier, TierPages],
        copier: PageCopier,
        *,
        max_pages_in_flight: int,
        is_host_read: Callable[[], bool],
    ) -> None:
        """`is_host_read`: whether copies to or from storage hold host pages that will soon be free."""
        self.counters = TransferCounters()
        self._tree = tree
        self._tier_pages = tier_pages
        self._copier = copier
        self._is_host_read = is_host_read
        self._max_pages = max_pages_in_flight
        self._num_pages = 0
        self.transfers: list[Transfer] = []
        self._waiting: dict[Node, int] = {}  # offloads that wait for room, with their pages; oldest first
        self._restores: dict[Transfer, Restore] = {}
        self._finished_restores: list[Restore] = []

    # --- starting -----------------------------------------------------------------------------------

    def offload(self, node: Node, *, is_parking: bool = False) -> bool:
        """Begin to copy the device run of `node` to the host, unless it is there or being copied.

        If copies in flight hold the room that the run needs, the offload waits for them (`start_waiting`). Returns
        whether it has begun.
        """
        if not _lacks_host(node):
            if isinstance(node.offload, Transfer):
                node.offload.is_parking |= is_parking
            return False
        refusal = self._begin_offload(node, is_parking=is_parking)
        if refusal is not None and node not in self._waiting:
            self._wait(node, refusal)
        return refusal is None

    def start_waiting(self) -> None:
        """Once a turn: begin offloads that waited for room, the oldest first."""
        while self._waiting:
            node = next(iter(self._waiting))
            refusal = None
            for each in self._tree.path_to(node):  # the node may have been split since
                if _lacks_host(each):
                    refusal = refusal or self._begin_offload(each)
            if refusal is not None and self._is_room_coming():
                return
            num_pages = self._waiting.pop(node)
            if refusal is not None:
                self.counters.drop(refusal, num_pages)
            elif Tier.DEVICE not in node.runs and Tier.HOST not in node.runs:
                self.counters.drop("gone", num_pages)

    def restore(self, nodes: list[Node], restore: Restore) -> bool:
        """Begin to copy the host runs of `nodes`, a path from upper to lower, to the device; False without room."""
        runs = [node.runs[Tier.HOST] for node in nodes]
        num_pages = sum(len(run.pages) for run in runs)
        pages = self._tier_pages[Tier.DEVICE].take(num_pages, owner=Owner.TRANSFER)
        if pages is None:
            return False
        sources: list[tuple[Run, int]] = []
        for node, run in zip(nodes, runs, strict=True):
            node.restore = restore
            self._tier_pages[Tier.HOST].pin(run)
            sources.append((run, len(run.pages)))
        count_use(runs)
        handle = self._copier.restore(np.concatenate([run.pages for run in runs]), pages)
        transfer = Transfer(
            source_tier=Tier.HOST,
            destination_tier=Tier.DEVICE,
            sources=sources,
            pages=pages,
            handle=handle,
        )
        self._restores[transfer] = restore
        self._begin(transfer)
        return True

    # --- every turn ---------------------------------------------------------------------------------

    def apply_finished(self, *, num_leases: int) -> list[tuple[Transfer, list[Node]]]:
        """Attach the pages of readable copies that were not dropped, and end the copies that are done.

        Returns the ended copies, each with the nodes that its pages were attached to in this call. `num_leases`: the
        number of all leases.
        """
        is_alone = num_leases <= len(self._restores)  # each restore holds one lease
        finished: list[tuple[Transfer, list[Node]]] = []
        for transfer in self.transfers:
            is_done = transfer.handle.is_done()
            attached: list[Node] = []
            if not transfer.is_delivered and (is_done or _is_readable(transfer, is_alone)):
                attached = self._deliver(transfer, is_done=is_done)
            if is_done:
                self._end(transfer)
                finished.append((transfer, attached))
        if finished:
            ended = {id(transfer) for transfer, _ in finished}
            self.transfers = [transfer for transfer in self.transfers if id(transfer) not in ended]
        return finished

    def mark_retired(self, scope: Scope) -> int:
        """Mark every copy whose destination and token path are in `scope`, to be dropped when done; returns how many.

        Delivered pages are in the tree, and are cut there.
        """
        marked = 0
        for transfer in self.transfers:
            is_under_way = not transfer.is_dropped and not transfer.is_delivered
            is_due = is_under_way and transfer.destination_tier in scope.tiers
            if is_due and self._is_in(scope, transfer.lowest):
                transfer.is_dropped = True
                marked += 1
        if Tier.HOST in scope.tiers:
            for node in [node for node in self._waiting if self._is_in(scope, node)]:
                self.counters.drop("retired", self._waiting.pop(node))
        return marked

    def take_finished_restores(self) -> list[Restore]:
        """Restores whose pages have been delivered. The caller releases the lease of each."""
        finished, self._finished_restores = self._finished_restores, []
        return finished

    def is_wanted(self, restore: Restore) -> bool:
        """Whether a restore in flight will be attached. If its pages were retired meanwhile, no request may join it."""
        return any(it is restore and not transfer.is_dropped for transfer, it in self._restores.items())

    def forget_generations(self) -> None:
        """What copies in flight bring was computed under counters of a store that is detached."""
        for transfer in self.transfers:
            for run, _ in transfer.segments():  # of which some may have been cut
                run.generations = None

    @property
    def num_in_flight(self) -> int:
        return len(self.transfers)

    @property
    def is_parking(self) -> bool:
        return any(transfer.is_parking for transfer in self.transfers)

    def in_flight(self) -> dict[str, int]:
        found: dict[str, int] = {}
        if not self.transfers:  # as mostly, and asked for every turn
            return found
        for transfer in self.transfers:
            found[transfer.kind] = found.get(transfer.kind, 0) + 1
        return found

    # ------------------------------------------------------------------------------------------------

    def _begin_offload(self, node: Node, *, is_parking: bool = False) -> str | None:
        """Begin to copy the device run of `node`; returns None, or the reason why it cannot be copied now."""
        run = node.runs[Tier.DEVICE]
        num_pages = len(run.pages)
        if run.arrival is not None:  # its host pages were flushed meanwhile; this copy would not wait for the restore
            return "arriving"
        if self._num_pages + num_pages > self._max_pages:
            return "queue_full"
        pages = self._tier_pages[Tier.HOST].take(num_pages, owner=Owner.TRANSFER)
        if pages is None:
            return "host_full"
        for each in run.chain():  # pins the whole path, as a lease does: runs above a pinned run are not evicted
            self._tier_pages[Tier.DEVICE].pin(each)
        transfer = Transfer(
            source_tier=Tier.DEVICE,
            destination_tier=Tier.HOST,
            sources=[(run, num_pages)],
            pages=pages,
            handle=self._copier.offload(run.pages, pages),
            is_parking=is_parking,
        )
        node.offload = transfer
        self._begin(transfer)
        return None

    def _wait(self, node: Node, refusal: str) -> None:
        """Let `node` wait for room if copies in flight will free some and not too many pages wait already."""
        num_pages = len(node.tokens) // self._tree.page_size
        if not self._is_room_coming():
            self.counters.drop(refusal, num_pages)
        elif sum(self._waiting.values()) + num_pages > self._max_pages:
            self.counters.drop("queue_full", num_pages)
        else:
            self._waiting[node] = num_pages

    def _is_room_coming(self) -> bool:
        return bool(self.transfers) or self._is_host_read()

    def _is_in(self, scope: Scope, node: Node) -> bool:
        """Whether `scope` covers any page of the path to `node`."""
        if not scope.has_namespace(node.namespace):
            return False
        limit = scope.limit_for(self._tree.path(node), self._tree.page_size)
        return limit is not None and limit < self._tree.depth(node)

    def _begin(self, transfer: Transfer) -> None:
        self._num_pages += len(transfer.pages)
        self.transfers.append(transfer)

    def _deliver(self, transfer: Transfer, *, is_done: bool) -> list[Node]:
        """Attach the pages of `transfer` where the tree still has a place for them, and mark its restore as done."""
        transfer.is_delivered = True
        tier = transfer.destination_tier
        is_usable = not transfer.is_dropped and not transfer.handle.has_failed
        attached: list[Node] = []
        for run, pages in transfer.segments():
            if tier is Tier.HOST:
                run.node.offload = None
            else:
                run.node.restore = None
            if is_usable and self._attach(run, tier, pages):
                attached.append(run.node)
            else:
                transfer.spare.append(pages)
                self.counters.drop(self._cause(transfer), len(pages))
        if attached and not is_done:
            self._hold(transfer, [node.runs[tier] for node in attached])
        restore = self._restores.pop(transfer, None)
        if restore is not None:
            restore.is_done = True
            restore.was_dropped = not is_usable
            self._finished_restores.append(restore)
        return attached

    def _hold(self, transfer: Transfer, runs: list[Run]) -> None:
        """Pin the path of `runs`, upper first, so that they stay in place until `transfer` has written them."""
        transfer.arriving = runs[-1]
        for run in runs:
            run.arrival = transfer
        for run in runs[-1].chain():
            self._tier_pages[run.tier].pin(run)

    def _end(self, transfer: Transfer) -> None:
        """End `transfer`: nothing reads its source or writes its destination any more."""
        assert transfer.arriving is None or not transfer.handle.has_failed, "a copy failed after it was readable"
        self._num_pages -= len(transfer.pages)
        if not transfer.handle.has_failed:
            self.counters.add(transfer.kind, len(transfer.pages), transfer.handle.took_s)
        for pages in transfer.spare:
            self._tier_pages[transfer.destination_tier].pool.free(pages, giver=Owner.TRANSFER)
        for run in transfer.pinned():
            if run.arrival is transfer:
                run.arrival = None
            self._tier_pages[run.tier].unpin(run)

    def _attach(self, source: Run, tier: Tier, pages: PageIds) -> bool:
        """Whether the node of `source` could take `pages`, a copy of it, as its run on `tier`."""
        node = source.node
        if not node.is_linked or tier in node.runs or node.parent is None:
            return False
        if len(pages) * self._tree.page_size != len(node.tokens):
            return False  # its source was cut, and the node split since: the pages no longer match it
        parent: Run | None = None
        if tier is Tier.DEVICE and not node.parent.is_root:
            parent = node.parent.runs.get(Tier.DEVICE)
            if parent is None:  # the run above was evicted meanwhile, and a device run needs its path on the device
                return False
        self._tier_pages[tier].attach(
            node, pages, giver=Owner.TRANSFER, parent=parent, pins=0, generations=source.generations
        )
        return True

    def _cause(self, transfer: Transfer) -> str:
        if transfer.is_dropped:
            return "retired"
        return "copy_failed" if transfer.handle.has_failed else "gone"


def _is_readable(transfer: Transfer, is_alone: bool) -> bool:
    """Whether requests may already use the pages of a restore that is not done."""
    if transfer.destination_tier is not Tier.DEVICE or not isinstance(transfer.handle, EarlyCopyHandle):
        return False
    return transfer.handle.is_readable(is_alone=is_alone)


def _lacks_host(node: Node) -> bool:
    """Whether `node` has device pages that are neither on the host nor being copied there."""
    return Tier.DEVICE in node.runs and Tier.HOST not in node.runs and node.offload is None
