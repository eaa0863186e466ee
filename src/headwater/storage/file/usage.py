"""How full a file store is, as all its processes know it: a few numbers in a file, changed under the lock.

Room is reserved before a page is written and given back after it is deleted, so the numbers are never below the
truth and the store never grows over its capacity. They can be above it: a process killed between reserving
and writing, two that wrote the same page, a person with `rm`. Counting what is on disk mends that.
"""

import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

from headwater.storage.file.folder import OPEN_FILE, StoreFolder

_NUMBERS = struct.Struct("<6q")
_BLOCK_BYTES = 4096  # of common file systems: what a file takes is a multiple of it


@dataclass(frozen=True, slots=True)
class Usage:
    num_pages: int = 0
    num_bytes: int = 0

    def plus(self, other: "Usage") -> "Usage":
        return Usage(self.num_pages + other.num_pages, self.num_bytes + other.num_bytes)

    def minus(self, other: "Usage") -> "Usage":
        return Usage(self.num_pages - other.num_pages, self.num_bytes - other.num_bytes)

    def is_within(self, low: "Usage", high: "Usage") -> bool:
        return (
            low.num_pages <= self.num_pages <= high.num_pages
            and low.num_bytes <= self.num_bytes <= high.num_bytes
        )


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What is in use now, and all that was ever reserved and freed."""

    in_use: Usage = Usage()
    reserved: Usage = Usage()
    freed: Usage = Usage()


def allocated_bytes(file_bytes: int) -> int:
    """About what a file of this size takes from the disk."""
    return -(-file_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


class UsageLedger:
    """The shared numbers of one open store."""

    def __init__(self, folder: StoreFolder) -> None:
        self._folder = folder
        self._fd = os.open("usage", os.O_RDWR | os.O_CREAT | OPEN_FILE, 0o600, dir_fd=folder.root_fd)
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        self.is_new = os.fstat(self._fd).st_size != _NUMBERS.size

    def read(self) -> LedgerState:
        content = os.pread(self._fd, _NUMBERS.size, 0)
        if len(content) != _NUMBERS.size:
            return LedgerState()
        numbers = _NUMBERS.unpack(content)
        return LedgerState(Usage(*numbers[0:2]), Usage(*numbers[2:4]), Usage(*numbers[4:6]))

    def try_reserve(self, num_bytes: int, *, capacity_bytes: int) -> int:
        """Count one page of `num_bytes` in if there is room: 0; else change nothing: the bytes that lack."""
        page = Usage(1, num_bytes)
        with self._folder.locked():
            state = self.read()
            lacking = state.in_use.num_bytes + num_bytes - capacity_bytes
            if lacking > 0:
                return lacking
            self._write(
                replace(state, in_use=state.in_use.plus(page), reserved=state.reserved.plus(page))
            )
            return 0

    def free(self, pages: Usage) -> None:
        """Count reservations out that came to nothing."""
        self.delete(lambda: pages)

    def delete(self, delete_pages: Callable[[], Usage]) -> Usage:
        """Delete pages and count them out in one step; what `delete_pages` says that it deleted.

        Done apart, a count by another process in between would count them out a second time.
        """
        with self._folder.locked():
            deleted = delete_pages()
            if deleted.num_pages:
                state = self.read()
                in_use, freed = state.in_use.minus(deleted), state.freed.plus(deleted)
                self._write(replace(state, in_use=in_use, freed=freed))
        return deleted

    def correct(self, counted: Usage, *, staged: Usage, since: LedgerState) -> None:
        """Compare with a count of what is on disk that began at `since`, when `staged` was being written.

        Others went on meanwhile, so a count only tells bounds; numbers within them are left alone, others
        are set to the upper one.
        """
        with self._folder.locked():
            now = self.read()
            low = counted.minus(now.freed.minus(since.freed))
            high = counted.plus(staged).plus(now.reserved.minus(since.reserved))
            if self.is_new or not now.in_use.is_within(low, high):
                self._write(replace(now, in_use=high))
                self.is_new = False

    def _write(self, state: LedgerState) -> None:
        numbers: list[int] = []
        for usage in (state.in_use, state.reserved, state.freed):
            numbers += (max(0, usage.num_pages), max(0, usage.num_bytes))
        # one pwrite: a reader without the lock sees all numbers of one state
        os.pwrite(self._fd, _NUMBERS.pack(*numbers), 0)
