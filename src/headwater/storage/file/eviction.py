"""Eviction in a file store: the least recently used pages first, from any process.

The files' modification times keep the order of use, across processes and restarts. So no index has to be rebuilt:
one walk over the folders finds enough of the oldest pages for many evictions.
"""

import heapq
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from headwater.storage.counters import StorageCounters
from headwater.storage.file.buckets import BucketFolders
from headwater.storage.file.folder import StoreFolder, is_hash_name
from headwater.storage.file.staging import Staging
from headwater.storage.file.usage import Usage, UsageLedger, allocated_bytes

WINDOW_NS = 10 * 10**9  # uses within one window count as simultaneous and touch a file only once
_DEPTH_STEP_NS = 1000
_MIN_CANDIDATES = 256
_CANDIDATE_SHARE = 8  # a walk remembers the oldest eighth
_EMPTY_BUCKET_AGE_S = 3600.0


class PageFile(NamedTuple):
    """A page as found by a walk. Pages compare by age."""

    mtime_ns: int
    bucket_id: bytes
    name: str
    num_bytes: int


def recency_ns(depth: int) -> int:
    """Modification time for a page that is used now: the end of the current window, minus a term for its depth.

    So of pages used together the deeper ones look older, and a sequence loses its tail before its head.
    """
    window_start = time.time_ns() // WINDOW_NS * WINDOW_NS
    return window_start + WINDOW_NS - 1 - min(depth * _DEPTH_STEP_NS, WINDOW_NS - 1)


def is_recent(mtime_ns: int) -> bool:
    """Whether a page has already been touched in the current window."""
    return mtime_ns // WINDOW_NS >= time.time_ns() // WINDOW_NS


class Evictor:
    """Deletes old pages of one open store. One thread at a time; several processes may evict at the same time."""

    def __init__(
        self,
        folder: StoreFolder,
        buckets: BucketFolders,
        *,
        staging: Staging,
        ledger: UsageLedger,
        counters: StorageCounters,
    ) -> None:
        self._folder = folder
        self._staging = staging
        self._buckets = buckets
        self._ledger = ledger
        self._counters = counters
        self._lock = threading.Lock()
        self._oldest: deque[PageFile] = deque()

    def evict(self, num_bytes: int) -> int:
        """Delete at least `num_bytes` of the oldest pages; return the freed bytes, 0 if none could be deleted."""
        with self._lock:
            freed = self._evict_known(num_bytes)
            if freed < num_bytes:
                self._walk()
                freed += self._evict_known(num_bytes - freed)
        return freed

    def recount(self) -> None:
        """Count the pages on disk, and correct the ledger."""
        with self._lock:
            self._walk()

    def _evict_known(self, num_bytes: int) -> int:
        freed = 0
        while freed < num_bytes and self._oldest:
            freed += self._evict_one(self._oldest.popleft())
        return freed

    def _evict_one(self, page: PageFile) -> int:
        with self._buckets.opened(page.bucket_id) as fd:
            if fd is None:
                return 0
            evicted = self._ledger.delete(lambda: _unlink_unused(page, dir_fd=fd))
        self._counters.add("evicted_pages", evicted.num_pages)
        return evicted.num_bytes

    def _walk(self) -> None:
        before, staged = self._ledger.read(), self._staging.usage()
        num_pages = num_bytes = 0

        def counted() -> Iterator[PageFile]:
            nonlocal num_pages, num_bytes
            for page in self._all_pages():
                num_pages += 1
                num_bytes += page.num_bytes
                yield page

        num_candidates = max(_MIN_CANDIDATES, before.in_use.num_pages // _CANDIDATE_SHARE)
        self._oldest = deque(heapq.nsmallest(num_candidates, counted()))
        on_disk = Usage(num_pages, num_bytes).plus(self._trash_usage())
        self._ledger.correct(on_disk, staged=staged, since=before)

    def _all_pages(self) -> Iterator[PageFile]:
        for bucket_id in self._buckets.ids():
            num_pages = 0
            for page in self._pages_of(bucket_id):
                num_pages += 1
                yield page
            if num_pages == 0:
                self._discard_if_forgotten(bucket_id)

    def _pages_of(self, bucket_id: bytes) -> Iterator[PageFile]:
        with self._buckets.opened(bucket_id) as fd:
            if fd is None:
                return
            for name, info in page_files(fd):
                yield PageFile(info.st_mtime_ns, bucket_id, name, allocated_bytes(info.st_size))

    def _discard_if_forgotten(self, bucket_id: bytes) -> None:
        """Remove an empty bucket, unless a process may be about to write into it."""
        with self._buckets.opened(bucket_id) as fd:
            is_old = fd is not None and time.time() - os.fstat(fd).st_mtime > _EMPTY_BUCKET_AGE_S
        if is_old:
            self._buckets.discard(bucket_id)

    def _trash_usage(self) -> Usage:
        sizes: list[int] = []
        for name in os.listdir(self._folder.trash_fd):
            try:
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._folder.trash_fd)
            except OSError:
                continue  # emptied by another process meanwhile
            try:
                sizes.extend(allocated_bytes(info.st_size) for _, info in page_files(fd))
            finally:
                os.close(fd)
        return Usage(len(sizes), sum(sizes))


def _unlink_unused(page: PageFile, *, dir_fd: int) -> Usage:
    try:
        info = os.stat(page.name, dir_fd=dir_fd, follow_symlinks=False)
        if info.st_mtime_ns != page.mtime_ns:
            return Usage()  # used since the walk
        os.unlink(page.name, dir_fd=dir_fd)
    except FileNotFoundError:
        return Usage()
    return Usage(1, page.num_bytes)


def page_files(dir_fd: int) -> Iterator[tuple[str, os.stat_result]]:
    """Name and state of the page files in an open bucket folder; foreign files are left out."""
    with os.scandir(dir_fd) as entries:
        for entry in entries:
            if is_hash_name(entry.name) and entry.is_file(follow_symlinks=False):
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # evicted meanwhile
                yield entry.name, info
