"""A store in Redis or Valkey (6.2 or newer, one server), shared by any number of machines."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import redis
import redis.exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from headwater.storage.backend import ReadStatus, StorageUsage, WriteStatus, check_batch, is_outdated
from headwater.storage.counters import StorageCounters
from headwater.storage.errors import StorageClosed, StorageUnavailable
from headwater.storage.file.bucket_record import encode_bucket
from headwater.storage.page_format import HEADER_BYTES, Defect, find_defect, header_of
from headwater.storage.page_key import Bucket, PageKey
from headwater.storage.redis.generations import (
    START,
    adopt_server,
    counters_of,
    raise_counter,
    wait_until_logged,
)
from headwater.storage.redis.keyspace import MemoryRoom, PageCounter, Reaper
from headwater.storage.redis.layout import (
    BUCKETS,
    GENERATIONS,
    Client,
    is_out_of_memory,
    page_name,
    portions,
    storage_error,
)
from headwater.storage.redis.packing import CommandPacker

_T = TypeVar("_T")
_READ_BYTES = 128 << 10  # per system call; larger reads allocate more than they return


class RedisBackend:
    """Pages as strings with a time to live, which each use renews. The Redis server decides about eviction.

    The first call connects, so Headwater starts even if the Redis server is down. With an append-only file, raised
    counters survive a crash of the Redis server (and one of its machine, with `appendfsync always`). Without such a
    file, pages from before a restart are not found after it (generations.py).
    """

    kind = "redis"

    def __init__(
        self,
        url: str,
        *,
        capacity_bytes: int | None = None,
        ttl_s: int | None = 86_400,
        timeout_s: float = 5.0,
    ) -> None:
        """`url` is redis://[user:password@]host:port/db, rediss://... or unix:///path?db=0&password=...

        With `capacity_bytes`, nothing is put while the server's total memory exceeds that limit. `ttl_s` None keeps
        pages until the server evicts them. `timeout_s` limits each answer of the server.
        """
        if capacity_bytes is not None and capacity_bytes < 1:
            raise ValueError(f"capacity_bytes must be at least 1, found {capacity_bytes}")
        if ttl_s is not None and ttl_s < 1:
            raise ValueError(f"ttl_s must be at least 1, found {ttl_s}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, found {timeout_s}")
        self._capacity_bytes = capacity_bytes
        self._ttl: tuple[Any, ...] = () if ttl_s is None else ("EX", ttl_s)
        self._timeout_s = timeout_s
        self._pool = _make_pool(url, timeout_s=timeout_s)
        self._client: Client = redis.Redis(connection_pool=self._pool)
        self._counters = StorageCounters()
        self._page_counter = PageCounter(self._client)
        self._reaper = Reaper(self._client)
        self._room = MemoryRoom(self._client, capacity_bytes)
        self._is_closed = False

    def generations(self, scope_ids: Sequence[bytes]) -> tuple[int, ...]:
        return self._call(lambda: self._current(scope_ids))

    def raise_generation(self, scope_id: bytes) -> int:
        return self._call(lambda: self._raise(scope_id))

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        return self._call(lambda: self._exists(keys))

    def get(self, keys: Sequence[PageKey], into: Sequence[memoryview]) -> list[ReadStatus]:
        check_batch(keys, into, writable=True)
        statuses: list[ReadStatus] = []
        for part in portions([len(buffer) for buffer in into]):
            chosen = slice(part.start, part.stop)
            statuses += self._call(lambda chosen=chosen: self._read(keys[chosen], into[chosen]))
        self._counters.add_reads(statuses, into)
        return statuses

    def put(self, keys: Sequence[PageKey], pages: Sequence[memoryview]) -> list[WriteStatus]:
        check_batch(keys, pages, writable=False)
        statuses: list[WriteStatus] = []
        for part in portions([len(page) for page in pages]):
            chosen = slice(part.start, part.stop)
            statuses += self._call(lambda chosen=chosen: self._write(keys[chosen], pages[chosen]))
        self._counters.add_writes(statuses, pages)
        return statuses

    def delete(self, keys: Sequence[PageKey]) -> int:
        names = [page_name(key) for key in keys]
        num_deleted = self._call(lambda: self._client.execute_command("UNLINK", *names)) if names else 0
        self._page_counter.subtract(num_deleted)
        return num_deleted

    def usage(self) -> StorageUsage:
        def count() -> StorageUsage:
            pages = self._page_counter.count()
            return StorageUsage(pages.num_pages, pages.num_bytes, self._room.limit_bytes())

        return self._call(count)

    def reap(self, *, max_pages: int, abandoned: Collection[bytes] = ()) -> int:
        num_reaped = self._call(lambda: self._reaper.reap(max_pages=max_pages, abandoned=abandoned))
        self._page_counter.subtract(num_reaped)
        self._counters.add("reaped_pages", num_reaped)
        return num_reaped

    def counters(self) -> dict[str, int]:
        return self._counters.snapshot()

    def close(self) -> None:
        self._is_closed = True
        self._pool.disconnect()

    # --- one round trip or two ----------------------------------------------------------------------

    def _current(self, scope_ids: Sequence[bytes]) -> tuple[int, ...]:
        current = counters_of(self._client.execute_command("HMGET", GENERATIONS, START, *scope_ids))
        if current is None:
            self._adopt_anew()
            current = counters_of(self._client.execute_command("HMGET", GENERATIONS, START, *scope_ids))
        if current is None:
            raise StorageUnavailable("redis: the counters vanish again and again; is the memory too small?")
        return current

    def _raise(self, scope_id: bytes) -> int:
        raised = raise_counter(self._client.execute_command, scope_id)
        if raised is None:
            self._adopt_anew()
            raised = raise_counter(self._client.execute_command, scope_id)
        if raised is None:
            raise StorageUnavailable("redis: the counters vanish again and again; is the memory too small?")
        wait_until_logged(self._client.execute_command, limit_s=self._timeout_s)
        return raised

    def _exists(self, keys: Sequence[PageKey]) -> list[bool]:
        stale, answers = self._ask(keys, lambda name: ("EXISTS", name))
        return [bool(answer) and key.bucket not in stale for key, answer in zip(keys, answers, strict=True)]

    def _read(self, keys: Sequence[PageKey], into: Sequence[memoryview]) -> list[ReadStatus]:
        command = "GETEX" if self._ttl else "GET"
        stale, answers = self._ask(keys, lambda name: (command, name, *self._ttl))
        statuses: list[ReadStatus] = []
        for key, stored, buffer in zip(keys, answers, into, strict=True):
            if key.bucket in stale:
                statuses.append(ReadStatus.STALE)
            elif stored is None:
                statuses.append(ReadStatus.MISS)
            else:
                statuses.append(self._accept(key, memoryview(stored), buffer))
        return statuses

    def _accept(self, key: PageKey, stored: memoryview, into: memoryview) -> ReadStatus:
        payload = stored[HEADER_BYTES:]
        defect = find_defect(key, stored[:HEADER_BYTES], payload)
        if defect is None and len(payload) != len(into):
            defect = Defect.LENGTH
        if defect is None:
            into[:] = payload
            return ReadStatus.HIT
        self._counters.add(f"defect_{defect}")
        self._page_counter.subtract(self._client.execute_command("UNLINK", page_name(key)))
        return ReadStatus.CORRUPT

    def _write(self, keys: Sequence[PageKey], pages: Sequence[memoryview]) -> list[WriteStatus]:
        # asks first, so that present pages do not cross the network
        if self._ttl:
            stale, answers = self._ask(keys, lambda name: ("EXPIRE", name, self._ttl[1]))
        else:
            stale, answers = self._ask(keys, lambda name: ("EXISTS", name))
        statuses = [
            WriteStatus.STALE if key.bucket in stale else WriteStatus.PRESENT if answer else WriteStatus.FULL
            for key, answer in zip(keys, answers, strict=True)
        ]
        missing = [index for index, status in enumerate(statuses) if status is WriteStatus.FULL]
        if missing and self._room.has_room(sum(len(pages[index]) for index in missing)):
            written = self._set([(keys[index], pages[index]) for index in missing])
            for index, status in zip(missing, written, strict=True):
                statuses[index] = status
        return statuses

    def _set(self, pages: Sequence[tuple[PageKey, memoryview]]) -> list[WriteStatus]:
        pipeline = self._client.pipeline(transaction=False)
        buckets = list(dict.fromkeys(key.bucket for key, _ in pages))
        for bucket in buckets:
            pipeline.execute_command("HSETNX", BUCKETS, bucket.id, encode_bucket(bucket))
        for key, page in pages:
            stored = (header_of(key, page), page)  # one argument, see CommandPacker
            pipeline.execute_command("SET", page_name(key), stored, "NX", *self._ttl)
        answers = pipeline.execute(raise_on_error=False)
        statuses = [_status_of(answer) for answer in answers[len(buckets) :]]
        stored = [len(page) for (_, page), s in zip(pages, statuses, strict=True) if s is WriteStatus.STORED]
        self._page_counter.add(len(stored), sum(stored) + HEADER_BYTES * len(stored))
        return statuses

    def _ask(
        self, keys: Sequence[PageKey], command_for: Callable[[bytes], tuple[Any, ...]]
    ) -> tuple[set[Bucket], list[Any]]:
        """Send one command per page together with the counters; return the stale buckets and the answers."""
        buckets = list(dict.fromkeys(key.bucket for key in keys))
        pipeline = self._client.pipeline(transaction=False)
        for bucket in buckets:
            pipeline.execute_command("HMGET", GENERATIONS, START, *bucket.scope_ids)
        for key in keys:
            pipeline.execute_command(*command_for(page_name(key)))
        answers = pipeline.execute()
        stale: set[Bucket] = set()
        for bucket, values in zip(buckets, answers, strict=False):
            current = counters_of(values)
            if current is None or is_outdated(bucket, current):
                stale.add(bucket)
        return stale, answers[len(buckets) :]

    def _adopt_anew(self) -> None:
        """Start lost counters again, after the server was emptied, by opening a new connection."""
        connection = self._pool.get_connection()
        try:
            connection.disconnect()
            connection.connect()
        finally:
            self._pool.release(connection)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StorageClosed("the redis store is closed")

    def _call(self, operation: Callable[[], _T]) -> _T:
        self._check_open()
        try:
            try:
                return operation()
            except redis.exceptions.ConnectionError:
                # the connection may be older than a restart of the server, so a new one is tried; a repeated command
                # is harmless: pages are equal, and a second flush only flushes again
                self._check_open()
                return operation()
        except (redis.exceptions.RedisError, OSError) as error:
            raise storage_error(error) from error


def _make_pool(url: str, *, timeout_s: float) -> redis.ConnectionPool:
    try:
        pool = redis.ConnectionPool.from_url(
            url,
            protocol=2,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            socket_read_size=_READ_BYTES,
            retry=Retry(NoBackoff(), 0),
            redis_connect_func=adopt_server,
            command_packer=CommandPacker(),
        )
        pool.make_connection()  # does not connect, but rejects unknown options
    except (ValueError, TypeError) as error:
        raise ValueError(f"storage url must be redis://, rediss:// or unix://: {error}") from error
    return pool


def _status_of(answer: Any) -> WriteStatus:
    if isinstance(answer, Exception):
        if is_out_of_memory(answer):
            return WriteStatus.FULL
        raise answer
    return WriteStatus.STORED if answer else WriteStatus.PRESENT
