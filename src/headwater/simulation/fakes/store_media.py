"""The media of simulated stores (memory, or files in a folder), with ways to damage their pages."""

import os
import tempfile
from pathlib import Path
from typing import Protocol

from headwater.storage.backend import StorageBackend
from headwater.storage.file.backend import FileBackend
from headwater.storage.file.folder import SUBFOLDER
from headwater.storage.memory import MemoryBackend
from headwater.storage.page_key import PageKey

_IN_MEMORY = Path("/dev/shm")  # a file system in memory, where it exists


class Medium(StorageBackend, Protocol):
    """A store whose pages can be damaged in place. The methods take a page that it has."""

    def has(self, key: PageKey) -> bool: ...

    def flip_bit(self, key: PageKey, bit: int) -> None:
        """Flip a bit of a page, counted from the start of its header and modulo its size."""
        ...

    def truncate(self, key: PageKey, chance: int) -> None:
        """Truncate a page to a length that follows from `chance`."""
        ...

    def lose(self, key: PageKey) -> None: ...


class MemoryMedium(MemoryBackend):
    """The memory store."""

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
    """The real file store, in a folder that `close` deletes.

    Runs are repeatable while it has room; its choice of evicted pages depends on the machine's clock.
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
    """Open the medium `memory` or `file`."""
    return {"memory": MemoryMedium, "file": FileMedium}[kind](capacity_bytes=capacity_bytes)
