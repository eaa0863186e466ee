"""Stores for the simulation: one stamps pages with the turn of their read, one has scripted faults."""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from headwater.simulation.checks.violation import Violation
from headwater.simulation.fakes.canary import mix
from headwater.simulation.fakes.kv_records import TOKEN
from headwater.simulation.fakes.store_media import Medium
from headwater.storage.backend import ReadStatus, StorageBackend, StorageUsage, WriteStatus
from headwater.storage.errors import StorageTimeout, StorageUnavailable
from headwater.storage.page_key import PageKey

logging.getLogger("headwater.storage.guard").setLevel(logging.ERROR)  # in these runs stores fail all the time


class StampedBackend:
    """Passes calls on to `inner`, and stamps pages with the turn in which they were read.

    `due`: the counters that flushes of the store may raise.
    """

    def __init__(self, inner: StorageBackend, *, turn: Callable[[], int], due: Collection[bytes]) -> None:
        self.inner = inner
        self._turn = turn
        self._due = due

    @property
    def kind(self) -> str:
        return self.inner.kind

    def generations(self, scope_ids: Sequence[bytes]) -> tuple[int, ...]:
        return self.inner.generations(scope_ids)

    def raise_generation(self, scope_id: bytes) -> int:
        if scope_id not in self._due:
            raise Violation("flush_is_exact", "a store is flushed of what no flush has named")
        return self.inner.raise_generation(scope_id)

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        return self.inner.exists(keys)

    def get(self, keys: Sequence[PageKey], into: Sequence[memoryview]) -> list[ReadStatus]:
        statuses = self.inner.get(keys, into)
        for buffer, status in zip(into, statuses, strict=True):
            if status is ReadStatus.HIT:
                records = np.frombuffer(buffer, dtype=TOKEN)
                records["drawn"] = self._turn()
                records["retired"] = 0  # the mark is that of another tier
        return statuses

    def put(self, keys: Sequence[PageKey], pages: Sequence[memoryview]) -> list[WriteStatus]:
        return self.inner.put(keys, pages)

    def delete(self, keys: Sequence[PageKey]) -> int:
        return self.inner.delete(keys)

    def usage(self) -> StorageUsage:
        return self.inner.usage()

    def reap(self, *, max_pages: int, abandoned: Collection[bytes] = ()) -> int:
        return self.inner.reap(max_pages=max_pages, abandoned=abandoned)

    def counters(self) -> dict[str, int]:
        return self.inner.counters()

    def close(self) -> None:
        """Keep the store open for its other users."""


@dataclass(slots=True)
class StoreFaults:
    """The shares of calls or pages with each fault. With all at 0 the store is reliable."""

    fails: float = 0.0  # calls that raise without effect
    writes_late: float = 0.0  # puts that raise, but whose pages arrive later
    flips: float = 0.0  # pages damaged by a flipped bit before a read
    full: float = 0.0  # pages refused for lack of room
    is_read_only: bool = False  # no page can be written and no generation raised
    truncates: float = 0.0  # pages truncated before a read
    loses: float = 0.0  # pages deleted before a read


class UnreliableStore:
    """A store on `medium` whose faults follow from a seed and the number of the call."""

    def __init__(self, medium: Medium, *, seed: int) -> None:
        self.faults = StoreFaults()
        self.late_writes: list[tuple[list[PageKey], list[bytes]]] = []
        self._medium = medium
        self._seed = mix(seed + 1)
        self._num_draws = 0

    @property
    def kind(self) -> str:
        return self._medium.kind

    def generations(self, scope_ids: Sequence[bytes]) -> tuple[int, ...]:
        self._may_fail("generations")
        return self._medium.generations(scope_ids)

    def raise_generation(self, scope_id: bytes) -> int:
        self._check_writable()
        self._may_fail("raise_generation")
        generation = self._medium.raise_generation(scope_id)
        self._may_fail("the answer of raise_generation")  # it took effect, but the caller gets an error
        return generation

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        self._may_fail("exists")
        return self._medium.exists(keys)

    def get(self, keys: Sequence[PageKey], into: Sequence[memoryview]) -> list[ReadStatus]:
        self._may_fail("get")
        for key in keys:
            if self._strikes(self.faults.flips) and self._medium.has(key):
                self._medium.flip_bit(key, self._draw())
            if self._strikes(self.faults.truncates) and self._medium.has(key):
                self._medium.truncate(key, self._draw())
            if self._strikes(self.faults.loses) and self._medium.has(key):
                self._medium.lose(key)
        return self._medium.get(keys, into)

    def put(self, keys: Sequence[PageKey], pages: Sequence[memoryview]) -> list[WriteStatus]:
        self._check_writable()
        self._may_fail("put")
        if self._strikes(self.faults.writes_late):
            self.late_writes.append((list(keys), [bytes(page) for page in pages]))
            raise StorageTimeout("put took too long")
        if self._strikes(self.faults.full):
            return [WriteStatus.FULL] * len(keys)
        return self._medium.put(keys, pages)

    def delete(self, keys: Sequence[PageKey]) -> int:
        return self._medium.delete(keys)

    def usage(self) -> StorageUsage:
        return self._medium.usage()

    def reap(self, *, max_pages: int, abandoned: Collection[bytes] = ()) -> int:
        self._may_fail("reap")
        return self._medium.reap(max_pages=max_pages, abandoned=abandoned)

    def counters(self) -> dict[str, int]:
        return self._medium.counters()

    def close(self) -> None:
        self._medium.close()

    def land_late_writes(self) -> None:
        """Carry out the late writes, whose puts have failed."""
        late, self.late_writes = self.late_writes, []
        for keys, pages in late:
            self._medium.put(keys, [memoryview(page) for page in pages])

    def _check_writable(self) -> None:
        if self.faults.is_read_only:
            raise StorageUnavailable("the store is read-only")

    def _may_fail(self, operation: str) -> None:
        if self._strikes(self.faults.fails):
            raise StorageUnavailable(f"{operation} failed by script")

    def _strikes(self, share: float) -> bool:
        return share > 0 and (self._draw() & 0xFFFFFFFF) < share * 2**32

    def _draw(self) -> int:
        self._num_draws += 1
        return mix(self._seed ^ mix(self._num_draws))
