"""The only mover of pages between tiers. Owns every copy in flight and its destination pages."""

from collections.abc import Callable

import numpy as np

from headwater.cache.copier import EarlyCopyHandle, PageCopier
from headwater.cache.namespace import Scope, Tier
from headwater.cache.page_pool import Owner, PageIds
from headwater.cache.radix_tree import Node, RadixTree, Run
from headwater.cache.tier_pages import TierPages
from headwater.cache.transfer import Load, Transfer, TransferCounters


class TransferEngine:
    """Starts copies, and takes in those that are done once a turn. Never blocks.

    While a copy is in flight its source runs are pinned, and its destination pages are its own or pinned, so no
    retirement and no eviction can make either side be used for something else.
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
        """`is_host_read`: whether others hold host pages that will come back by themselves."""
        self.counters = TransferCounters()
        self._tree = tree
        self._tier_pages = tier_pages
        self._copier = copier
        self._is_host_read = is_host_read
        self._max_pages = max_pages_in_flight
        self._num_pages = 0
        self.transfers: list[Transfer] = []
        self._waiting: dict[Node, int] = {}  # offloads for which there is no room yet, with their pages; in order
        self._loads: dict[Transfer, Load] = {}
        self._finished_loads: list[Load] = []

    # --- starting -----------------------------------------------------------------------------------

    def offload(self, node: Node, *, is_parking: bool = False) -> bool:
        """Begin to copy the device run of `node` to the host, unless it is there or on its way.

        Where copies in flight hold the room that it needs, it waits for them: see `start_waiting`. Returns
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
        """Once a turn: begin the offloads that waited for room, in their order."""
        while self._waiting:
            node = next(iter(self._waiting))
            refusal = None
            for each in self._tree.path_to(node):  # it may have been split since
                if _lacks_host(each):
                    refusal = refusal or self._begin_offload(each)
            if refusal is not None and self._is_room_coming():
                return
            num_pages = self._waiting.pop(node)
            if refusal is not None:
                self.counters.drop(refusal, num_pages)
            elif Tier.DEVICE not in node.runs and Tier.HOST not in node.runs:
                self.counters.drop("gone", num_pages)

    def restore(self, nodes: list[Node], load: Load) -> bool:
        """Begin to copy the host runs of `nodes`, a path from upper to lower, to the device."""
        runs = [node.runs[Tier.HOST] for node in nodes]
        num_pages = sum(len(run.pages) for run in runs)
        pages = self._tier_pages[Tier.DEVICE].take(num_pages, owner=Owner.TRANSFER)
        if pages is None:
            return False
        sources: list[tuple[Run, int]] = []
        for node, run in zip(nodes, runs, strict=True):
            node.restore = load
            self._tier_pages[Tier.HOST].pin(run)
            sources.append((run, len(run.pages)))
        handle = self._copier.restore(np.concatenate([run.pages for run in runs]), pages)
        transfer = Transfer(
            source_tier=Tier.HOST,
            destination_tier=Tier.DEVICE,
            sources=sources,
            pages=pages,
            handle=handle,
        )
        self._loads[transfer] = load
        self._begin(transfer)
        return True

    # --- every turn ---------------------------------------------------------------------------------

    def apply_finished(self, *, num_leases: int) -> list[tuple[Transfer, list[Node]]]:
        """Attach what is readable and still wanted; take in the copies that are done.

        Returns those that are done, with the nodes that were attached to now. `num_leases`: of all there are.
        """
        is_alone = num_leases <= len(self._loads)  # each load has one
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
        """Drop, when done, every copy whose destination and token path are in `scope`; returns how many.

        What has been delivered is in the tree, and cut there.
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

    def take_finished_loads(self) -> list[Load]:
        """Loads whose pages have been delivered; the lease each holds is to be released."""
        finished, self._finished_loads = self._finished_loads, []
        return finished

    def is_wanted(self, load: Load) -> bool:
        """Whether a load in flight will be attached: nobody joins a copy of what was retired meanwhile."""
        return any(it is load and not transfer.is_dropped for transfer, it in self._loads.items())

    @property
    def num_in_flight(self) -> int:
        return len(self.transfers)

    @property
    def is_parking(self) -> bool:
        return any(transfer.is_parking for transfer in self.transfers)

    def in_flight(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for transfer in self.transfers:
            found[transfer.kind] = found.get(transfer.kind, 0) + 1
        return found

    # ------------------------------------------------------------------------------------------------

    def _begin_offload(self, node: Node, *, is_parking: bool = False) -> str | None:
        """Why the device run of `node` cannot be copied now; None when it has begun."""
        run = node.runs[Tier.DEVICE]
        num_pages = len(run.pages)
        if run.arrival is not None:  # the host's were flushed while they came up; nothing makes this copy wait
            return "arriving"
        if self._num_pages + num_pages > self._max_pages:
            return "queue_full"
        pages = self._tier_pages[Tier.HOST].take(num_pages, owner=Owner.TRANSFER)
        if pages is None:
            return "host_full"
        for each in run.chain():  # the whole path, as a lease does: nothing above a pinned run is evicted
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
        """Let `node` wait for room, if any is to come and not too much waits already."""
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
        """Whether `scope` holds any page of the path to `node`."""
        if not scope.has_namespace(node.namespace):
            return False
        limit = scope.limit_for(self._tree.path(node), self._tree.page_size)
        return limit is not None and limit < self._tree.depth(node)

    def _begin(self, transfer: Transfer) -> None:
        self._num_pages += len(transfer.pages)
        self.transfers.append(transfer)

    def _deliver(self, transfer: Transfer, *, is_done: bool) -> list[Node]:
        """Attach the pages of `transfer`, as far as they are wanted, and let go on who waits for them."""
        transfer.is_delivered = True
        tier = transfer.destination_tier
        is_usable = not transfer.is_dropped and not transfer.handle.has_failed
        attached: list[Node] = []
        for run, pages in transfer.segments():
            if tier is Tier.HOST:
                run.node.offload = None
            else:
                run.node.restore = None
            if is_usable and self._attach(run.node, tier, pages):
                attached.append(run.node)
            else:
                transfer.spare.append(pages)
                self.counters.drop(self._cause(transfer), len(pages))
        if attached and not is_done:
            self._hold(transfer, [node.runs[tier] for node in attached])
        load = self._loads.pop(transfer, None)
        if load is not None:
            load.is_done = True
            load.was_dropped = not is_usable
            self._finished_loads.append(load)
        return attached

    def _hold(self, transfer: Transfer, runs: list[Run]) -> None:
        """Pin the path of `runs`, upper first: they stay where they are until `transfer` has written them."""
        transfer.arriving = runs[-1]
        for run in runs:
            run.arrival = transfer
        for run in runs[-1].chain():
            self._tier_pages[run.tier].pin(run)

    def _end(self, transfer: Transfer) -> None:
        """Nothing reads its source or writes its destination any more."""
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

    def _attach(self, node: Node, tier: Tier, pages: PageIds) -> bool:
        """Whether `node` could take `pages` as its run on `tier`."""
        if not node.is_linked or tier in node.runs or node.parent is None:
            return False
        if len(pages) * self._tree.page_size != len(node.tokens):
            return False  # its source was cut and the node split since: the pages are no longer this node's
        parent: Run | None = None
        if tier is Tier.DEVICE and not node.parent.is_root:
            parent = node.parent.runs.get(Tier.DEVICE)
            if parent is None:  # evicted meanwhile: a device run needs its path on the device
                return False
        self._tier_pages[tier].attach(node, pages, giver=Owner.TRANSFER, parent=parent, pins=0)
        return True

    def _cause(self, transfer: Transfer) -> str:
        if transfer.is_dropped:
            return "retired"
        return "copy_failed" if transfer.handle.has_failed else "gone"


def _is_readable(transfer: Transfer, is_alone: bool) -> bool:
    """Whether requests may find the pages of a restore that is not done."""
    if transfer.destination_tier is not Tier.DEVICE or not isinstance(transfer.handle, EarlyCopyHandle):
        return False
    return transfer.handle.is_readable(is_alone=is_alone)


def _lacks_host(node: Node) -> bool:
    """Whether `node` has pages that are neither on the host nor on their way there."""
    return Tier.DEVICE in node.runs and Tier.HOST not in node.runs and node.offload is None
