"""Copies of pages on all ranks (`cache.copier.PageCopier`): each rank copies its heads of the same pages."""

import itertools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from headwater.cache.copier import CopyHandle, PageCopier
from headwater.cache.page_pool import PageIds
from headwater.ranks import orders
from headwater.ranks.plan_codec import Kind, write_copy
from headwater.ranks.processes import RankProcesses


@runtime_checkable
class ArrivingCopy(CopyHandle, Protocol):
    """A restore of one rank whose pages steps may read before it is done, as soon as all ranks are near."""

    def is_near(self, *, is_alone: bool) -> bool:
        """Whether the copy cannot fail any more, and so little is to come that steps may read. Stays true.

        `is_alone`: no other request would be delayed.
        """
        ...

    def begin_reading(self) -> None:
        """The steps launched from now on wait for the layers that they read."""
        ...


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


class EarlyRanksCopy(RanksCopy):
    """A restore (`cache.copier.EarlyCopyHandle`) that is readable when all ranks are near."""

    def __init__(self, own: ArrivingCopy, num_others: int, announce: Callable[[], None]) -> None:
        """`announce` has the other ranks begin to read; it comes before the steps that do."""
        super().__init__(own, num_others)
        self._arriving = own
        self._announce = announce
        self.num_far = {True: num_others, False: num_others}  # ranks that have not reported, by `is_alone`
        self._is_found = False

    def is_readable(self, *, is_alone: bool) -> bool:
        if not self._is_found and not self.num_far[is_alone] and self._arriving.is_near(is_alone=is_alone):
            self._announce()
            self._arriving.begin_reading()
            self._is_found = True
        return self._is_found


class RanksCopier:
    """Starts each copy on all ranks, in the order of the plan stream."""

    make_copy, make_early_copy = RanksCopy, EarlyRanksCopy

    def __init__(self, own: PageCopier, processes: RankProcesses) -> None:
        self._own = own
        self._processes = processes
        self._ids = itertools.count()
        self._copies: dict[int, RanksCopy] = {}
        processes.on_copied = self._take
        processes.on_near = self._take_near

    def offload(self, device_pages: PageIds, host_pages: PageIds) -> RanksCopy:
        return self._start(Kind.OFFLOAD, device_pages, host_pages)

    def restore(self, host_pages: PageIds, device_pages: PageIds) -> RanksCopy:
        return self._start(Kind.RESTORE, host_pages, device_pages)

    def _start(self, kind: Kind, sources: PageIds, targets: PageIds) -> RanksCopy:
        copy_id = next(self._ids)
        start = self._own.offload if kind is Kind.OFFLOAD else self._own.restore
        own, num_others, stream = start(sources, targets), self._processes.num_ranks - 1, self._processes.stream
        if kind is Kind.RESTORE and isinstance(own, ArrivingCopy):
            copy = self.make_early_copy(own, num_others, lambda: stream.write(Kind.READ_EARLY, b"", (copy_id,)))
        else:
            copy = self.make_copy(own, num_others)
        self._copies[copy_id] = copy
        write_copy(stream, kind, copy_id, sources, targets)
        return copy

    def _take_near(self, report: orders.Near) -> None:
        """Called in the thread that reads reports."""
        copy = self._copies.get(report.copy_id)
        if isinstance(copy, EarlyRanksCopy) and not report.has_failed:
            copy.num_far[report.is_alone] -= 1

    def _take(self, report: orders.Copied) -> None:
        """Called in the thread that reads reports."""
        copy = self._copies[report.copy_id]
        copy.has_failed_elsewhere |= report.has_failed
        copy.longest_s = max(copy.longest_s, report.took_s)
        copy.num_missing -= 1  # last: the loop may look at any moment
        if not copy.num_missing:
            del self._copies[report.copy_id]
