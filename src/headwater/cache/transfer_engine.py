"""The only mover of pages between tiers. Owns every copy in flight and its destination pages."""

import numpy as np

from headwater.cache.copier import PageCopier
from headwater.cache.namespace import Scope, Tier
from headwater.cache.page_pool import Owner, PageIds
from headwater.cache.radix_tree import Node, RadixTree, Run
from headwater.cache.tier_books import TierBooks
from headwater.cache.transfer import Load, Transfer
from headwater.cache.transfer_counters import TransferCounters
from headwater.clock import Clock


class TransferEngine:
    """Starts copies, and takes in those that are done once a turn. Never blocks.

    While a copy is in flight its source runs are pinned and its destination pages are its own, so no retirement
    and no eviction can make either side be used for something else.
    """

    def __init__(
        self,
        tree: RadixTree,
        books: dict[Tier, TierBooks],
        copier: PageCopier,
        *,
        clock: Clock,
        max_pages_in_flight: int,
    ) -> None:
        self.counters = TransferCounters()
        self._tree = tree
        self._books = books
        self._copier = copier
        self._clock = clock
        self._max_pages = max_pages_in_flight
        self._num_pages = 0
        self.transfers: list[Transfer] = []
        self._loads: dict[Transfer, Load] = {}
        self._finished_loads: list[Load] = []

    # --- starting -----------------------------------------------------------------------------------

    def offload(self, node: Node, *, is_parking: bool = False) -> bool:
        """Begin to copy the device run of `node` to the host, unless it is there or on its way."""
        run = node.runs.get(Tier.DEVICE)
        if run is None or Tier.HOST in node.runs:
            return False
        if isinstance(node.offload, Transfer):
            node.offload.is_parking |= is_parking
            return False
        num_pages = len(run.pages)
        if self._num_pages + num_pages > self._max_pages:
            self.counters.drop("queue_full", num_pages)
            return False
        pages = self._books[Tier.HOST].take(num_pages, owner=Owner.TRANSFER)
        if pages is None:
            self.counters.drop("host_full", num_pages)
            return False
        for each in run.chain():  # the whole path, as a lease does: nothing above a pinned run is evicted
            self._books[Tier.DEVICE].pin(each)
        handle = self._copier.offload(run.pages, pages)
        transfer = Transfer(
            source_tier=Tier.DEVICE,
            destination_tier=Tier.HOST,
            sources=[(run, num_pages)],
            pages=pages,
            handle=handle,
            started_s=self._clock.now(),
            is_parking=is_parking,
        )
        node.offload = transfer
        self._begin(transfer)
        return True

    def restore(self, nodes: list[Node], load: Load) -> bool:
        """Begin to copy the host runs of `nodes`, a path from upper to lower, to the device."""
        runs = [node.runs[Tier.HOST] for node in nodes]
        num_pages = sum(len(run.pages) for run in runs)
        pages = self._books[Tier.DEVICE].take(num_pages, owner=Owner.TRANSFER)
        if pages is None:
            return False
        sources: list[tuple[Run, int]] = []
        for node, run in zip(nodes, runs, strict=True):
            node.restore = load
            self._books[Tier.HOST].pin(run)
            sources.append((run, len(run.pages)))
        handle = self._copier.restore(np.concatenate([run.pages for run in runs]), pages)
        transfer = Transfer(
            source_tier=Tier.HOST,
            destination_tier=Tier.DEVICE,
            sources=sources,
            pages=pages,
            handle=handle,
            started_s=self._clock.now(),
        )
        self._loads[transfer] = load
        self._begin(transfer)
        return True

    # --- every turn ---------------------------------------------------------------------------------

    def apply_finished(self) -> list[tuple[Transfer, list[Node]]]:
        """Take in the copies that are done: attach what is still wanted. Returns them with the nodes attached to."""
        if not self.transfers:
            return []
        done = [transfer for transfer in self.transfers if transfer.handle.is_done()]
        if done:
            self.transfers = [transfer for transfer in self.transfers if transfer not in done]
        return [(transfer, self._take_in(transfer)) for transfer in done]

    def mark_retired(self, scope: Scope) -> int:
        """Drop, when done, every copy whose destination and token path are in `scope`; returns how many."""
        marked = 0
        for transfer in self.transfers:
            if transfer.is_dropped or transfer.destination_tier not in scope.tiers:
                continue
            node = transfer.lowest
            if not scope.has_namespace(node.namespace):
                continue
            limit = scope.limit_for(self._tree.path(node), self._tree.page_size)
            if limit is not None and limit < self._tree.depth(node):
                transfer.is_dropped = True
                marked += 1
        return marked

    def take_finished_loads(self) -> list[Load]:
        """Loads whose copies are all done; the lease each holds is to be released."""
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

    def _begin(self, transfer: Transfer) -> None:
        self._num_pages += len(transfer.pages)
        self.transfers.append(transfer)

    def _take_in(self, transfer: Transfer) -> list[Node]:
        num_pages = len(transfer.pages)
        self._num_pages -= num_pages
        self.counters.add(transfer.kind, num_pages, self._clock.now() - transfer.started_s)
        load = self._loads.pop(transfer, None)
        attached: list[Node] = []
        is_usable = not transfer.is_dropped and not transfer.handle.has_failed
        for run, pages in transfer.segments():
            if transfer.destination_tier is Tier.HOST:
                run.node.offload = None
            else:
                run.node.restore = None
            if is_usable and self._attach(run.node, transfer.destination_tier, pages):
                attached.append(run.node)
            else:
                self._books[transfer.destination_tier].pool.free(pages, giver=Owner.TRANSFER)
                self.counters.drop(self._cause(transfer), len(pages))
        for run in transfer.pinned():
            self._books[transfer.source_tier].unpin(run)
        if load is not None:
            load.is_done = True
            load.was_dropped = not is_usable
            self._finished_loads.append(load)
        return attached

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
        self._books[tier].attach(node, pages, giver=Owner.TRANSFER, parent=parent, pins=0)
        return True

    def _cause(self, transfer: Transfer) -> str:
        if transfer.is_dropped:
            return "retired"
        return "copy_failed" if transfer.handle.has_failed else "gone"
