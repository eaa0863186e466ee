"""What the state machine of test_tiers_stateful.py compares the cache with: memories, copies, stores and flushes."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from headwater.cache.namespace import Namespace, Scope
from headwater.cache.page_pool import Owner, PagePool
from headwater.cache.retirement import Retirement
from headwater.storage.errors import StorageUnavailable
from headwater.storage.memory import MemoryBackend
from headwater.storage.page_format import HEADER_BYTES, find_defect
from headwater.storage.page_key import PageKey

PAGE = 2  # tokens


class Store(MemoryBackend):
    """One of two; on command it does not acknowledge flushes, though it can be read."""

    refuses_flushes = False

    def raise_generation(self, scope_id: bytes) -> int:
        if self.refuses_flushes:
            raise StorageUnavailable("not now")
        return super().raise_generation(scope_id)

    def reopen(self) -> None:
        self._is_closed = False  # its generations live on

    def held(self) -> list[PageKey]:
        return sorted(self._pages, key=lambda key: (key.page, key.bucket.id))

    def contents(self) -> list[int]:
        """The numbers of the contents that it would return."""
        found: list[int] = []
        for key, page in self._pages.items():
            header, payload = page[:HEADER_BYTES], page[HEADER_BYTES:]
            if not self._is_stale(key.bucket) and find_defect(key, header, payload) is None:
                found.append(int.from_bytes(payload, sys.byteorder))
        return found


@dataclass(frozen=True)
class Content:
    """What was computed into a page."""

    namespace: Namespace
    path: tuple[int, ...]
    time: int
    is_private: bool  # by a request that leaves nothing behind


@dataclass
class Flush:
    """What was retired, and the stores that carry it out."""

    time: int
    scope: Scope
    stores: set[int]
    retirement: Retirement

    def covers(self, namespace: Namespace, path: tuple[int, ...], index: int) -> bool:
        """Whether it covers page `index` of `path`, from the words of the contract and not from the code."""
        scope = self.scope
        if scope.cache_salt not in (None, namespace.cache_salt):
            return False
        prefix = () if scope.prefix is None else tuple(scope.prefix.tolist())
        return (index + 1) * PAGE >= len(prefix) and path[: len(prefix)] == prefix


class Memory:
    """Pages of one tier: a content's number in each, since when it was on its way, and from which store, if any."""

    page_bytes = 8

    def __init__(self, num_pages: int) -> None:
        self.content = np.zeros(num_pages, dtype=np.int64)
        self.began = np.zeros(num_pages, dtype=np.int64)
        self.store = np.full(num_pages, -1)
        self.pool: PagePool | None = None
        self.now: Callable[[], tuple[int, int]] = lambda: (0, 0)  # the time, and the store attached

    def view(self, page: int) -> memoryview:
        if self.pool is not None and self.pool.owner_of(page) is Owner.TRANSFER:  # a prefetch will write it
            self.content[page] = 0
            self.began[page], self.store[page] = self.now()
        return memoryview(self.content[page : page + 1].view(np.uint8))


class Copy:
    """Ends when the machine says so; its source must not change before, and nobody else writes its target."""

    took_s = 0.0

    def __init__(self, source: Memory, sources, target: Memory, targets, time: int) -> None:
        self.has_failed = False
        self._is_done = False
        self._source, self._sources, self._target, self._targets = source, sources.copy(), target, targets.copy()
        self._before = source.content[sources].copy()
        target.content[targets] = 0
        target.began[targets] = time
        target.store[targets] = -1

    def end(self, *, fails: bool) -> None:
        self._check()
        self._target.content[self._targets] = -1 if fails else self._before
        self.has_failed = fails
        self._is_done = True

    def is_done(self) -> bool:
        return self._is_done

    def _check(self) -> None:
        assert np.array_equal(self._source.content[self._sources], self._before), "a page was reused while copied"
        assert not self._target.content[self._targets].any(), "somebody wrote to the target of a copy"


class EarlyCopy(Copy):
    """A restore: may be read before it is done, and does not fail then. Steps that wait see what it brings."""

    has_arrived = False

    def arrive(self) -> None:
        self._check()
        self._target.content[self._targets] = self._before
        self.has_arrived = True

    def end(self, *, fails: bool) -> None:
        if not self.has_arrived:
            super().end(fails=fails)
            return
        assert np.array_equal(self._source.content[self._sources], self._before), "a page was reused while copied"
        assert np.array_equal(self._target.content[self._targets], self._before), "a page that arrives was written to"
        self._is_done = True

    def is_readable(self, *, is_alone: bool) -> bool:
        return self.has_arrived
