"""What a store of the storage tier must do. The example, and the double for tests, is memory.py."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from headwater.storage.page_key import Bucket, PageKey


class ReadStatus(StrEnum):
    """What became of one page of a `get`. Only after HIT does its buffer hold anything that may be used."""

    HIT = "hit"
    MISS = "miss"
    CORRUPT = "corrupt"  # found, but damaged; it has been deleted
    STALE = "stale"  # a counter of its bucket was raised since the caller read the generations


class WriteStatus(StrEnum):
    """What became of one page of a `put`."""

    STORED = "stored"
    PRESENT = "present"  # the store had it
    FULL = "full"  # no room: disk full, memory limit, or larger than the whole store
    STALE = "stale"  # as in ReadStatus: nothing was written
    SKIPPED = "skipped"  # its place vanished while it was written; harmless


@dataclass(frozen=True, slots=True)
class StorageUsage:
    """What a store holds, of all servers that share it. It may lag behind by what is being written."""

    num_pages: int
    num_bytes: int
    capacity_bytes: int | None  # None: no limit of ours


class StorageBackend(Protocol):
    """A store of pages. Synchronous and thread-safe; called from worker threads, never from the loop.

    A call may block for as long as the medium does: the caller keeps deadlines and abandons the thread. Every
    method may raise `StorageError`; nothing else escapes. Buffers are one-dimensional, contiguous bytes and
    stay the caller's; a backend keeps no reference after it returns.

    Generations are counters in the store itself, one per scope (page_key.scope_id), that only grow. A page
    is found only while all counters of its bucket are what they were when the bucket was made. `exists`,
    `get` and `put` compare them at their start, on the store. So no call that begins after
    `raise_generation` returned, from any server, finds a page of before. A store that lost its counters
    numbers them anew from a random start: what lies there stays unreachable.
    """

    @property
    def kind(self) -> str:
        """The name that `registry.open_backend` knows it by."""
        ...

    def generations(self, scope_ids: Sequence[bytes]) -> tuple[int, ...]:
        """The counters of these scopes, in their order. Cheap: meant to be read with every batch."""
        ...

    def raise_generation(self, scope_id: bytes) -> int:
        """Add one to a counter and return it, atomically; it is durable when this returns."""
        ...

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        """Which pages the store has. A page may still turn out damaged, or be gone, when read."""
        ...

    def get(self, keys: Sequence[PageKey], into: Sequence[memoryview]) -> list[ReadStatus]:
        """Read pages, each into its own buffer of exactly its size; checksum, key and length are verified."""
        ...

    def put(self, keys: Sequence[PageKey], pages: Sequence[memoryview]) -> list[WriteStatus]:
        """Store pages. Each becomes visible whole or not at all, also if this process is killed."""
        ...

    def delete(self, keys: Sequence[PageKey]) -> int:
        """Delete pages if they are there; how many were."""
        ...

    def usage(self) -> StorageUsage: ...

    def reap(self, *, max_pages: int, abandoned: Collection[bytes] = ()) -> int:
        """Delete up to `max_pages` pages that nobody can name any more; how many were. For the background.

        These are the pages of buckets made under counters that have grown since, whoever made them, and of
        the bucket ids in `abandoned`, of which the caller knows that no server will come back to them.
        Everything else stays: other servers may use it. Call again until it returns 0.
        """
        ...

    def counters(self) -> dict[str, int]:
        """Monotonic counts, see counters.py."""
        ...

    def close(self) -> None:
        """Let go of files and connections. Later calls raise `StorageClosed`; calls in progress may, too."""
        ...


def check_batch(keys: Sequence[PageKey], buffers: Sequence[memoryview], *, writable: bool) -> None:
    """Assert that buffers fit the protocol: a wrong one would be found far from its place."""
    assert len(keys) == len(buffers)
    for buffer in buffers:
        assert buffer.ndim == 1 and buffer.itemsize == 1 and buffer.contiguous
        assert not (writable and buffer.readonly)


def is_outdated(bucket: Bucket, current: Sequence[int]) -> bool:
    """Whether the counters of the bucket's scopes make it unreachable: for ever, since they only grow."""
    return bucket.generations != tuple(current)
