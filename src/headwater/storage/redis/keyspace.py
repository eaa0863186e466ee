"""Our pages in Redis: counting them and their memory, and deleting unreachable ones."""

import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from headwater.storage.backend import is_outdated
from headwater.storage.file.bucket_record import decode_bucket
from headwater.storage.redis.generations import START
from headwater.storage.redis.layout import BUCKETS, GENERATIONS, PAGE_PREFIX, SCAN_COUNT, Client, bucket_of

COUNT_AGE_S = 30.0  # a count walks over all keys, so a scrape of the metrics must not always cause one
MEMORY_AGE_S = 1.0


@dataclass(frozen=True, slots=True)
class PageCount:
    num_pages: int
    num_bytes: int


class PageCounter:
    """Counts our pages from time to time; in between, it sees only the changes made by this process."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._counted_s = float("-inf")
        self._count = PageCount(0, 0)

    def count(self) -> PageCount:
        with self._lock:
            if time.monotonic() - self._counted_s > COUNT_AGE_S:
                self._count = self._walk()
                self._counted_s = time.monotonic()
            return self._count

    def add(self, num_pages: int, num_bytes: int) -> None:
        with self._lock:
            self._count = PageCount(self._count.num_pages + num_pages, self._count.num_bytes + num_bytes)

    def subtract(self, num_pages: int) -> None:
        """Subtract deleted pages, at the mean size."""
        with self._lock:
            left = max(0, self._count.num_pages - num_pages)
            self._count = PageCount(left, self._count.num_bytes * left // max(1, self._count.num_pages))

    def _walk(self) -> PageCount:
        num_pages = num_bytes = 0
        for names in _scan_pages(self._client):
            lengths = _pipelined(self._client, [("STRLEN", name) for name in names])
            num_pages += sum(length > 0 for length in lengths)
            num_bytes += sum(lengths)
        return PageCount(num_pages, num_bytes)


class MemoryRoom:
    """Whether the server uses less memory than a limit; asked at most once a second."""

    def __init__(self, client: Client, capacity_bytes: int | None) -> None:
        self._client = client
        self._capacity_bytes = capacity_bytes
        self._asked_s = float("-inf")
        self._left_bytes = 0

    def has_room(self, num_bytes: int) -> bool:
        if self._capacity_bytes is None:
            return True
        if time.monotonic() - self._asked_s > MEMORY_AGE_S:
            self._left_bytes = self._capacity_bytes - self._client.info("memory")["used_memory"]
            self._asked_s = time.monotonic()
        self._left_bytes -= num_bytes
        return self._left_bytes >= 0

    def limit_bytes(self) -> int | None:
        """The lower one of our limit and the server's."""
        server_limit = self._client.info("memory").get("maxmemory", 0)
        limits = [limit for limit in (self._capacity_bytes, server_limit) if limit]
        return min(limits, default=None)


class Reaper:
    """Deletes the pages of unreachable buckets. One thread at a time; several servers may reap at the same time.

    The reaper walks over all keys in portions. So no list of a bucket's pages has to be kept up to date while pages
    expire and are evicted.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._dead: frozenset[bytes] = frozenset()  # buckets that the present walk deletes, fixed at its start
        self._walk: Iterator[list[bytes]] | None = None
        self._found: deque[bytes] = deque()

    def reap(self, *, max_pages: int, abandoned: Collection[bytes]) -> int:
        """Delete up to `max_pages` pages; return their number, 0 if none are left."""
        with self._lock:
            return self._reap(max_pages, abandoned)

    def _reap(self, max_pages: int, abandoned: Collection[bytes]) -> int:
        dead = self._dead_buckets(abandoned)
        if dead != self._dead or self._walk is None:
            self._dead, self._walk = dead, _scan_pages(self._client)
            self._found.clear()
        num_deleted = 0
        while dead and num_deleted < max_pages:
            if not self._found:
                names = next(self._walk, None)
                if names is None:
                    self._client.execute_command("HDEL", BUCKETS, *dead)
                    self._walk = None
                    break
                self._found.extend(name for name in names if bucket_of(name) in dead)
            else:
                batch = [self._found.popleft() for _ in range(min(len(self._found), max_pages - num_deleted))]
                num_deleted += self._client.execute_command("UNLINK", *batch)
        return num_deleted

    def _dead_buckets(self, abandoned: Collection[bytes]) -> frozenset[bytes]:
        """The unreachable buckets that have a record; it is deleted after their pages, which ends the search."""
        records, raised = _pipelined(self._client, [("HGETALL", BUCKETS), ("HGETALL", GENERATIONS)])
        if START not in raised:
            return frozenset()  # the counters are lost; the next connection starts them again
        start = int(raised[START])
        dead: set[bytes] = set()
        for bucket_id, record in records.items():
            bucket = decode_bucket(bucket_id, record)
            if bucket_id in abandoned:
                dead.add(bucket_id)
            elif bucket is not None:
                current = [start + int(raised.get(scope_id, 0)) for scope_id in bucket.scope_ids]
                if is_outdated(bucket, current):
                    dead.add(bucket_id)
        return frozenset(dead)


def _scan_pages(client: Client) -> Iterator[list[bytes]]:
    cursor: Any = 0
    while True:
        cursor, names = client.execute_command(
            "SCAN", cursor, "MATCH", PAGE_PREFIX + b"*", "COUNT", SCAN_COUNT
        )
        yield names
        if int(cursor) == 0:
            return


def _pipelined(client: Client, commands: list[tuple[Any, ...]]) -> list[Any]:
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    return pipeline.execute()
