"""Host and storage tiers without contents, whose copies and calls take the time of real pages."""

from collections.abc import Callable, Sequence
from typing import Any

from headwater.cache.jobs import Job
from headwater.cache.page_pool import PageIds
from headwater.clock import Clock
from headwater.storage.backend import ReadStatus, WriteStatus
from headwater.storage.memory import MemoryBackend
from headwater.storage.page_format import HEADER_BYTES
from headwater.storage.page_key import PageKey

_STAND_IN_BYTES = 8  # in the place of a page
_MAX_QUEUED_JOBS = 256


class Link:
    """A connection that carries one transfer after the other."""

    def __init__(self, clock: Clock, *, bytes_per_s: float, latency_s: float = 0.0) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._free_s = 0.0

    def carry(self, num_bytes: float) -> tuple[float, float]:
        """Carry `num_bytes` as soon as the link is free; return the end and the duration of the transfer."""
        took_s = self._latency_s + num_bytes / self._bytes_per_s
        self._free_s = max(self._clock.now(), self._free_s) + took_s
        return self._free_s, took_s


class TimedCopy:
    """A copy that ends at a moment of the clock."""

    has_failed = False

    def __init__(self, clock: Clock, *, ends_s: float, took_s: float) -> None:
        self.took_s = took_s
        self._clock = clock
        self._ends_s = ends_s

    def is_done(self) -> bool:
        return self._clock.now() >= self._ends_s


class TimedCopier:
    """`cache.copier.PageCopier` with a link for each direction."""

    def __init__(self, clock: Clock, *, page_bytes: float, bytes_per_s: float) -> None:
        self._clock = clock
        self._page_bytes = page_bytes
        self._up = Link(clock, bytes_per_s=bytes_per_s)
        self._down = Link(clock, bytes_per_s=bytes_per_s)

    def offload(self, device_pages: PageIds, host_pages: PageIds) -> TimedCopy:
        return self._copy(self._down, len(device_pages))

    def restore(self, host_pages: PageIds, device_pages: PageIds) -> TimedCopy:
        return self._copy(self._up, len(host_pages))

    def _copy(self, link: Link, num_pages: int) -> TimedCopy:
        ends_s, took_s = link.carry(num_pages * self._page_bytes)
        return TimedCopy(self._clock, ends_s=ends_s, took_s=took_s)


class StandInPages:
    """`cache.host_pages.HostPages` of a few bytes each, whose contents are never used."""

    page_bytes = _STAND_IN_BYTES

    def __init__(self) -> None:
        self._page = bytearray(_STAND_IN_BYTES)

    def view(self, page: int) -> memoryview:
        return memoryview(self._page)


class MeteredStore(MemoryBackend):
    """A store of stand-ins that counts the pages read and written. All engines of a fleet share it."""

    def __init__(self, *, num_pages: int) -> None:
        super().__init__(capacity_bytes=num_pages * (HEADER_BYTES + _STAND_IN_BYTES))
        self.num_moved = 0

    def get(self, keys: Sequence[PageKey], into: Sequence[memoryview]) -> list[ReadStatus]:
        statuses = super().get(keys, into)
        self.num_moved += statuses.count(ReadStatus.HIT)
        return statuses

    def put(self, keys: Sequence[PageKey], pages: Sequence[memoryview]) -> list[WriteStatus]:
        statuses = super().put(keys, pages)
        self.num_moved += statuses.count(WriteStatus.STORED)
        return statuses


class TimedJob(Job):
    """A job that ends at a moment of the clock; its work has been done at the start."""

    def __init__(self, work: Callable[[Job], Any], clock: Clock) -> None:
        super().__init__(work)
        self.ends_s = 0.0
        self._clock = clock

    def is_done(self) -> bool:
        return self._clock.now() >= self.ends_s


class TimedJobs:
    """`cache.jobs.JobRunner` over one link to `store`. A job's writes are visible from its start."""

    def __init__(self, store: MeteredStore, link: Link, *, clock: Clock, page_bytes: float) -> None:
        self._store = store
        self._link = link
        self._clock = clock
        self._page_bytes = page_bytes
        self._open: list[TimedJob] = []

    def submit(self, work: Callable[[Job], Any]) -> TimedJob | None:
        self._open = [job for job in self._open if not job.is_done()]
        if len(self._open) >= _MAX_QUEUED_JOBS:
            return None
        job = TimedJob(work, self._clock)
        before = self._store.num_moved
        job.run()
        job.ends_s, _ = self._link.carry((self._store.num_moved - before) * self._page_bytes)
        self._open.append(job)
        return job
