"""A bounded store in the memory of this process: the example of a backend, and the double for tests."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence

from headwater.storage.backend import ReadStatus, StorageUsage, WriteStatus, check_batch, is_outdated
from headwater.storage.counters import StorageCounters
from headwater.storage.errors import StorageClosed
from headwater.storage.page_format import HEADER_BYTES, find_defect, header_of
from headwater.storage.page_key import Bucket, PageKey


class MemoryBackend:
    """Pages as bytes in a dict, evicted in LRU order. The backend owns copies of all pages."""

    kind = "memory"

    def __init__(self, *, capacity_bytes: int) -> None:
        if capacity_bytes < 1:
            raise ValueError(f"capacity_bytes must be at least 1, found {capacity_bytes}")
        self._capacity_bytes = capacity_bytes
        self._lock = threading.RLock()
        self._pages: OrderedDict[PageKey, bytearray] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self._generations: Counter[bytes] = Counter()
        self._counters = StorageCounters()
        self._is_closed = False

    def generations(self, scope_ids: Sequence[bytes]) -> tuple[int, ...]:
        with self._lock:
            self._check_open()
            return tuple(self._generations[scope_id] for scope_id in scope_ids)

    def raise_generation(self, scope_id: bytes) -> int:
        with self._lock:
            self._check_open()
            self._generations[scope_id] += 1
            return self._generations[scope_id]

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        with self._lock:
            self._check_open()
            return [key in self._pages and not self._is_stale(key.bucket) for key in keys]

    def get(self, keys: Sequence[PageKey], into: Sequence[memoryview]) -> list[ReadStatus]:
        check_batch(keys, into, writable=True)
        with self._lock:
            self._check_open()
            statuses = [self._read(key, buffer) for key, buffer in zip(keys, into, strict=True)]
            self._mark_used(keys)
        self._counters.add_reads(statuses, into)
        return statuses

    def put(self, keys: Sequence[PageKey], pages: Sequence[memoryview]) -> list[WriteStatus]:
        check_batch(keys, pages, writable=False)
        with self._lock:
            self._check_open()
            statuses = [self._write(key, page) for key, page in zip(keys, pages, strict=True)]
            self._mark_used(keys)
        self._counters.add_writes(statuses, pages)
        return statuses

    def delete(self, keys: Sequence[PageKey]) -> int:
        with self._lock:
            self._check_open()
            present = {key for key in keys if key in self._pages}
            for key in present:
                self._drop(key)
            return len(present)

    def usage(self) -> StorageUsage:
        with self._lock:
            self._check_open()
            return StorageUsage(len(self._pages), self._num_bytes, self._capacity_bytes)

    def reap(self, *, max_pages: int, abandoned: Collection[bytes] = ()) -> int:
        with self._lock:
            self._check_open()
            buckets = {key.bucket.id: key.bucket for key in self._pages}.values()
            dead_ids = {bucket.id for bucket in buckets if bucket.id in abandoned or self._is_stale(bucket)}
            dead = [key for key in self._pages if key.bucket.id in dead_ids] if dead_ids else []
            for key in dead[:max_pages]:
                self._drop(key)
        num_reaped = min(len(dead), max_pages)
        self._counters.add("reaped_pages", num_reaped)
        return num_reaped

    def counters(self) -> dict[str, int]:
        return self._counters.snapshot()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._pages.clear()
            self._num_bytes = 0

    def flip_bit(self, key: PageKey, bit: int) -> None:
        """Damage a stored page (header and payload, bits counted from the start); for tests."""
        with self._lock:
            stored = self._pages[key]
            stored[bit // 8 % len(stored)] ^= 1 << bit % 8

    # --- inside the lock ----------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise StorageClosed("the memory store is closed")

    def _is_stale(self, bucket: Bucket) -> bool:
        return is_outdated(bucket, [self._generations[scope_id] for scope_id in bucket.scope_ids])

    def _read(self, key: PageKey, into: memoryview) -> ReadStatus:
        if self._is_stale(key.bucket):
            return ReadStatus.STALE
        stored = self._pages.get(key)
        if stored is None:
            return ReadStatus.MISS
        with memoryview(stored) as whole:
            defect = find_defect(key, whole[:HEADER_BYTES], whole[HEADER_BYTES:])
            if defect is None and len(whole) - HEADER_BYTES == len(into):
                into[:] = whole[HEADER_BYTES:]
                return ReadStatus.HIT
        self._drop(key)
        self._counters.add(f"defect_{defect or 'length'}")
        return ReadStatus.CORRUPT

    def _write(self, key: PageKey, page: memoryview) -> WriteStatus:
        if self._is_stale(key.bucket):
            return WriteStatus.STALE
        if key in self._pages:
            return WriteStatus.PRESENT
        num_bytes = HEADER_BYTES + len(page)
        if num_bytes > self._capacity_bytes:
            return WriteStatus.FULL
        while self._num_bytes + num_bytes > self._capacity_bytes:
            self._drop(next(iter(self._pages)))
            self._counters.add("evicted_pages")
        self._pages[key] = bytearray(header_of(key, page)) + page
        self._num_bytes += num_bytes
        return WriteStatus.STORED

    def _mark_used(self, keys: Sequence[PageKey]) -> None:
        # deepest first: a prefix is useful without its tail, but not without its head
        for key in sorted(keys, key=lambda key: key.depth, reverse=True):
            if key in self._pages:
                self._pages.move_to_end(key)

    def _drop(self, key: PageKey) -> None:
        self._num_bytes -= len(self._pages.pop(key))
