"""The ledger of a file store's usage: a few numbers in a file, which all processes change under the lock.

Room is reserved before a page is written and freed after it is deleted. So the numbers are never too low, and the
store never exceeds its capacity. They can be too high: after a process was killed between reservation and write,
after two processes wrote the same page, and after manual deletions. A count of the pages on disk corrects them.
"""

import os
import struct
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

from headwater.storage.file.folder import OPEN_FILE, StoreFolder

_NUMBERS = struct.Struct("<6q")
_BLOCK_BYTES = 4096  # of common file systems: files occupy multiples of it


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
    """The present usage, and the sums of all reservations and releases."""

    in_use: Usage = Usage()
    reserved: Usage = Usage()
    freed: Usage = Usage()


def allocated_bytes(file_bytes: int) -> int:
    """The approximate disk space of a file of this size."""
    return -(-file_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


class UsageLedger:
    """The shared ledger of one open store."""

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
        """Reserve room for a page of `num_bytes`. Returns 0, or the missing bytes if there is no room."""
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
        """Release reservations that were not used."""
        self.delete(lambda: pages)

    def delete(self, delete_pages: Callable[[], Usage]) -> Usage:
        """Delete pages and release their room in one step; return the result of `delete_pages`.

        In two steps, a count by another process in between would release the room a second time.
        """
        with self._folder.locked():
            deleted = delete_pages()
            if deleted.num_pages:
                state = self.read()
                in_use, freed = state.in_use.minus(deleted), state.freed.plus(deleted)
                self._write(replace(state, in_use=in_use, freed=freed))
        return deleted

    def correct(self, counted: Usage, *, staged: Usage, since: LedgerState) -> None:
        """Compare the ledger with a count of the disk that began at `since`, when `staged` was being written.

        Other processes continued meanwhile, so a count gives bounds only. Numbers within them stay; others are set to
        the upper bound.
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
        # one pwrite, so that a reader without the lock sees a consistent state
        os.pwrite(self._fd, _NUMBERS.pack(*numbers), 0)
