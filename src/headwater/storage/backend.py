"""The interface of a store in the storage tier. memory.py is the example, and the double for tests."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from headwater.storage.page_key import Bucket, PageKey


class ReadStatus(StrEnum):
    """The result for one page of a `get`. Only after HIT may its buffer be used."""

    HIT = "hit"
    MISS = "miss"
    CORRUPT = "corrupt"  # the page was damaged and has been deleted
    STALE = "stale"  # a counter of its bucket was raised after the caller read the generations


class WriteStatus(StrEnum):
    """The result for one page of a `put`."""

    STORED = "stored"
    PRESENT = "present"  # the store already had it
    FULL = "full"  # no room: the disk is full, the memory limit is reached, or the page exceeds the whole store
    STALE = "stale"  # as in ReadStatus; nothing was written
    SKIPPED = "skipped"  # its folder was deleted during the write; harmless


@dataclass(frozen=True, slots=True)
class StorageUsage:
    """The contents of a store, of all servers that share it. Writes in progress may be missing."""

    num_pages: int
    num_bytes: int
    capacity_bytes: int | None  # None: no limit was set


class StorageBackend(Protocol):
    """A store of pages. Synchronous and thread-safe; called from worker threads, never from the loop.

    A call may block as long as the medium does: the caller keeps the deadlines and abandons the thread. Every method
    may raise `StorageError`, and no other exception. Buffers are one-dimensional, contiguous bytes of the caller; a
    backend keeps no reference to them after it returns.

    Generations are counters in the store itself, one per scope (page_key.scope_id), that only grow. A page is found
    only while all counters of its bucket have the values with which the bucket was made. `exists`, `get` and `put`
    compare them in the store, at their start. So no call of any server that begins after `raise_generation` has
    returned finds an older page. A store that lost its counters starts them again at random numbers, so old pages stay
    unreachable.
    """

    @property
    def kind(self) -> str:
        """The name of this kind in `registry.open_backend`."""
        ...

    def generations(self, scope_ids: Sequence[bytes]) -> tuple[int, ...]:
        """The counters of these scopes, in the same order. Cheap enough to be read with every batch."""
        ...

    def raise_generation(self, scope_id: bytes) -> int:
        """Increment a counter atomically and return it. It is durable when the call returns."""
        ...

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        """Whether the store has each page. When it is read, a page may still be damaged or deleted."""
        ...

    def get(self, keys: Sequence[PageKey], into: Sequence[memoryview]) -> list[ReadStatus]:
        """Read each page into its own buffer of exactly the page's size, and verify checksum, key and length."""
        ...

    def put(self, keys: Sequence[PageKey], pages: Sequence[memoryview]) -> list[WriteStatus]:
        """Store pages. Each one becomes visible whole or not at all, even if this process is killed."""
        ...

    def delete(self, keys: Sequence[PageKey]) -> int:
        """Delete those pages that exist; return their number."""
        ...

    def usage(self) -> StorageUsage: ...

    def reap(self, *, max_pages: int, abandoned: Collection[bytes] = ()) -> int:
        """Delete up to `max_pages` unreachable pages; return their number. Meant for the background.

        Unreachable are the pages of all buckets whose counters have grown, and of the bucket ids in `abandoned`, which
        no server will use again. All other pages stay, since other servers may use them. Call again until it returns 0.
        """
        ...

    def counters(self) -> dict[str, int]:
        """Monotonic counts; see counters.py."""
        ...

    def close(self) -> None:
        """Release files and connections. Later calls raise `StorageClosed`; calls in progress may raise it as well."""
        ...


def check_batch(keys: Sequence[PageKey], buffers: Sequence[memoryview], *, writable: bool) -> None:
    """Assert that the buffers fit the protocol; a wrong buffer would be noticed only much later."""
    assert len(keys) == len(buffers)
    for buffer in buffers:
        assert buffer.ndim == 1 and buffer.itemsize == 1 and buffer.contiguous
        assert not (writable and buffer.readonly)


def is_outdated(bucket: Bucket, current: Sequence[int]) -> bool:
    """Whether the counters of its scopes make a bucket unreachable, which is final since they only grow."""
    return bucket.generations != tuple(current)
