"""What simulated stores keep their pages on: memory, or files in a folder; and how pages are damaged there."""

import os
import tempfile
from pathlib import Path
from typing import Protocol

from headwater.storage.backend import StorageBackend
from headwater.storage.file.backend import FileBackend
from headwater.storage.file.folder import SUBFOLDER
from headwater.storage.memory import MemoryBackend
from headwater.storage.page_key import PageKey

_IN_MEMORY = Path("/dev/shm")  # files that never reach a disk, where there is such a place


class Medium(StorageBackend, Protocol):
    """A store whose pages can be damaged where they lie. Each of these is for a page that it has."""

    def has(self, key: PageKey) -> bool: ...

    def flip_bit(self, key: PageKey, bit: int) -> None:
        """Bits are counted from the start of header and payload, and begin anew after the last one."""
        ...

    def truncate(self, key: PageKey, chance: int) -> None:
        """Keep some bytes from its start; how many follows from `chance`."""
        ...

    def lose(self, key: PageKey) -> None: ...


class MemoryMedium(MemoryBackend):
    """The store in memory."""

    def has(self, key: PageKey) -> bool:
        return key in self._pages

    def truncate(self, key: PageKey, chance: int) -> None:
        page = self._pages[key]
        num_left = chance % len(page)
        self._num_bytes -= len(page) - num_left
        del page[num_left:]

    def lose(self, key: PageKey) -> None:
        self._drop(key)


class FileMedium(FileBackend):
    """The file store as it serves, in a folder that is deleted with `close`.

    Runs repeat as long as it has room: which page it evicts depends on the clock of the machine.
    """

    def __init__(self, *, capacity_bytes: int) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="headwater-simulation-", dir=_IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None
        )
        super().__init__(self._folder.name, capacity_bytes=capacity_bytes)

    def has(self, key: PageKey) -> bool:
        return self._path(key).exists()

    def flip_bit(self, key: PageKey, bit: int) -> None:
        page = bytearray(self._path(key).read_bytes())
        if page:
            page[bit // 8 % len(page)] ^= 1 << bit % 8
            self._path(key).write_bytes(page)

    def truncate(self, key: PageKey, chance: int) -> None:
        size = self._path(key).stat().st_size
        os.truncate(self._path(key), chance % size if size else 0)

    def lose(self, key: PageKey) -> None:
        self._path(key).unlink()

    def close(self) -> None:
        super().close()
        self._folder.cleanup()

    def _path(self, key: PageKey) -> Path:
        return Path(self._folder.name, SUBFOLDER, "buckets", key.bucket.id.hex(), key.page.hex())


def open_medium(kind: str, *, capacity_bytes: int) -> Medium:
    """`memory` or `file`."""
    return {"memory": MemoryMedium, "file": FileMedium}[kind](capacity_bytes=capacity_bytes)
