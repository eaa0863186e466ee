"""Copies of pages on all ranks (`cache.copier.PageCopier`): each rank copies its heads of the same pages."""

import itertools

from headwater.cache.copier import CopyHandle, PageCopier
from headwater.cache.page_pool import PageIds
from headwater.ranks import orders
from headwater.ranks.plan_codec import Kind, write_copy
from headwater.ranks.processes import RankProcesses


class RanksCopy:
    """A copy (`cache.copier.CopyHandle`): done when it is on all ranks, failed if it failed on one."""

    def __init__(self, own: CopyHandle, num_others: int) -> None:
        self._own = own
        self.num_missing = num_others  # ranks that have not reported; the thread that reads reports counts them
        self.has_failed_elsewhere = False
        self.longest_s = 0.0

    def is_done(self) -> bool:
        return not self.num_missing and self._own.is_done()

    @property
    def has_failed(self) -> bool:
        return self.has_failed_elsewhere or self._own.has_failed

    @property
    def took_s(self) -> float:
        return max(self.longest_s, self._own.took_s)


class RanksCopier:
    """Starts each copy on all ranks, in the order of the plan stream."""

    make_copy = RanksCopy

    def __init__(self, own: PageCopier, processes: RankProcesses) -> None:
        self._own = own
        self._processes = processes
        self._ids = itertools.count()
        self._copies: dict[int, RanksCopy] = {}
        processes.on_copied = self._take

    def offload(self, device_pages: PageIds, host_pages: PageIds) -> RanksCopy:
        return self._start(Kind.OFFLOAD, device_pages, host_pages)

    def restore(self, host_pages: PageIds, device_pages: PageIds) -> RanksCopy:
        return self._start(Kind.RESTORE, host_pages, device_pages)

    def _start(self, kind: Kind, sources: PageIds, targets: PageIds) -> RanksCopy:
        copy_id = next(self._ids)
        start = self._own.offload if kind is Kind.OFFLOAD else self._own.restore
        copy = self._copies[copy_id] = self.make_copy(start(sources, targets), self._processes.num_ranks - 1)
        write_copy(self._processes.stream, kind, copy_id, sources, targets)
        return copy

    def _take(self, report: orders.Copied) -> None:
        """Called in the thread that reads reports."""
        copy = self._copies[report.copy_id]
        copy.has_failed_elsewhere |= report.has_failed
        copy.longest_s = max(copy.longest_s, report.took_s)
        copy.num_missing -= 1  # last: the loop may look at any moment
        if not copy.num_missing:
            del self._copies[report.copy_id]
