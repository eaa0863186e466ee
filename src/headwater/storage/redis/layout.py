"""Names and limits of our keys in Redis or Valkey. All begin with one prefix; no other key is touched.

    headwater:kv:1:generations          hash: start, run, aof, and one field per raised scope
    headwater:kv:1:buckets              hash: bucket id -> its record
    headwater:kv:1:page:<bucket><hash>  string: a stored page (page_format.py)

All counters are in one hash: if the server evicts it, all counters are lost together, and no old page matches.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import redis.exceptions

from headwater.storage.errors import StorageError, StorageFull, StorageTimeout, StorageUnavailable
from headwater.storage.page_key import DIGEST_BYTES, PageKey

GENERATIONS = b"headwater:kv:1:generations"
BUCKETS = b"headwater:kv:1:buckets"
PAGE_PREFIX = b"headwater:kv:1:page:"
SCAN_COUNT = 1000

PORTION_BYTES = 512 << 10  # of one pipeline; in larger ones the client loses more time than a round trip takes


class Client(Protocol):
    """The methods of redis.Redis in use; answers are the server's bytes."""

    def execute_command(self, *args: Any) -> Any: ...

    def pipeline(self, *, transaction: bool) -> Any: ...

    def info(self, section: str) -> Any: ...


def page_name(key: PageKey) -> bytes:
    return PAGE_PREFIX + key.bucket.id + key.page


def bucket_of(name: bytes) -> bytes:
    """The bucket id in a page's name."""
    return name[len(PAGE_PREFIX) : len(PAGE_PREFIX) + DIGEST_BYTES]


def portions(sizes: Sequence[int]) -> Iterator[range]:
    """Ranges of indices, each with at most PORTION_BYTES or a single page."""
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > PORTION_BYTES:
            yield range(start, index)
            start, total = index, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, redis.exceptions.OutOfMemoryError) or str(error).startswith("OOM")


def storage_error(error: Exception) -> StorageError:
    """The `StorageError` for a failure of the client."""
    if isinstance(error, redis.exceptions.TimeoutError | TimeoutError):
        return StorageTimeout(f"redis: {error}")
    if is_out_of_memory(error):
        return StorageFull(f"redis: {error}")
    return StorageUnavailable(f"redis: {type(error).__name__}: {error}")
