"""How full a file store is, as all its processes know it: two numbers in a file, changed under the lock.

Room is reserved before a page is written, so that the store never grows over its capacity. A process killed
between reserving and writing leaves the numbers too high; the next count of what is really there mends that.
"""

import os
import struct
import weakref
from dataclasses import dataclass

from headwater.storage.file_folder import OPEN_FILE, StoreFolder

_NUMBERS = struct.Struct("<qq")
_BLOCK_BYTES = 4096  # of common file systems: what a file takes is a multiple of it


@dataclass(frozen=True, slots=True)
class Usage:
    num_pages: int
    num_bytes: int


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

    def read(self) -> Usage:
        content = os.pread(self._fd, _NUMBERS.size, 0)
        return Usage(*_NUMBERS.unpack(content)) if len(content) == _NUMBERS.size else Usage(0, 0)

    def try_reserve(self, num_bytes: int, *, capacity_bytes: int) -> int:
        """Count one page of `num_bytes` in if there is room: 0; else change nothing: the bytes that lack."""
        with self._folder.locked():
            usage = self.read()
            lacking = usage.num_bytes + num_bytes - capacity_bytes
            if lacking > 0:
                return lacking
            self._write(usage.num_pages + 1, usage.num_bytes + num_bytes)
            return 0

    def subtract(self, num_pages: int, num_bytes: int) -> None:
        """Count deleted pages, or reservations that were not used, out."""
        if num_pages:
            with self._folder.locked():
                usage = self.read()
                self._write(usage.num_pages - num_pages, usage.num_bytes - num_bytes)

    def correct(self, counted: Usage, *, since: Usage) -> None:
        """Set to what was counted on disk, plus what changed since the count began at `since`."""
        with self._folder.locked():
            now = self.read()
            self._write(
                counted.num_pages + now.num_pages - since.num_pages,
                counted.num_bytes + now.num_bytes - since.num_bytes,
            )

    def _write(self, num_pages: int, num_bytes: int) -> None:
        # one pwrite: a reader without the lock sees both numbers or neither
        os.pwrite(self._fd, _NUMBERS.pack(max(0, num_pages), max(0, num_bytes)), 0)
