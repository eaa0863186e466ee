"""The embedded store: pages as files in a folder, which any number of processes may share."""

import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

from headwater.storage.backend import ReadStatus, StorageUsage, WriteStatus, check_batch
from headwater.storage.counters import StorageCounters
from headwater.storage.errors import StorageClosed, StorageFull, StorageUnavailable
from headwater.storage.file.folder import NO_ROOM, StoreVanished
from headwater.storage.file.store import FileStore
from headwater.storage.page_key import PageKey

_T = TypeVar("_T")
_OPEN_ATTEMPTS = 3  # the folder may be deleted again during its creation


class FileBackend:
    """At most `capacity_bytes` of pages in `directory`, evicted in LRU order.

    Every process applies its own limit to the pages of all processes. If the folder is deleted during use, reads miss
    and the next call makes a new folder.
    """

    kind = "file"

    def __init__(self, directory: str | Path, *, capacity_bytes: int) -> None:
        """ValueError for a limit below 1 or a folder of something else; StorageError if it cannot be opened."""
        if capacity_bytes < 1:
            raise ValueError(f"capacity_bytes must be at least 1, found {capacity_bytes}")
        self._directory = Path(directory).expanduser().absolute()
        self._capacity_bytes = capacity_bytes
        self._counters = StorageCounters()
        self._lock = threading.Lock()
        self._is_closed = False
        self._store: FileStore | None = None
        self._was_open = False
        self._call(lambda store: store.usage())
        self._was_open = True

    def generations(self, scope_ids: Sequence[bytes]) -> tuple[int, ...]:
        return self._call(lambda store: store.generations.current(scope_ids))

    def raise_generation(self, scope_id: bytes) -> int:
        return self._call(lambda store: store.raise_generation(scope_id))

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        return self._call(lambda store: store.exists(keys))

    def get(self, keys: Sequence[PageKey], into: Sequence[memoryview]) -> list[ReadStatus]:
        check_batch(keys, into, writable=True)
        statuses = self._call(lambda store: store.read(keys, into))
        self._counters.add_reads(statuses, into)
        return statuses

    def put(self, keys: Sequence[PageKey], pages: Sequence[memoryview]) -> list[WriteStatus]:
        check_batch(keys, pages, writable=False)
        statuses = self._call(lambda store: store.write(keys, pages))
        self._counters.add_writes(statuses, pages)
        return statuses

    def delete(self, keys: Sequence[PageKey]) -> int:
        return self._call(lambda store: store.delete(keys))

    def usage(self) -> StorageUsage:
        return self._call(lambda store: store.usage())

    def reap(self, *, max_pages: int, abandoned: Collection[bytes] = ()) -> int:
        num_reaped = self._call(lambda store: store.reap(max_pages=max_pages, abandoned=abandoned))
        self._counters.add("reaped_pages", num_reaped)
        return num_reaped

    def counters(self) -> dict[str, int]:
        return self._counters.snapshot()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._store = None  # the last call in progress closes its files

    def _call(self, operation: Callable[[FileStore], _T]) -> _T:
        try:
            for _ in range(_OPEN_ATTEMPTS):
                store = self._opened()
                try:
                    return operation(store)
                except StoreVanished:
                    self._forget(store)
        except OSError as error:
            kind = StorageFull if error.errno in NO_ROOM else StorageUnavailable
            raise kind(f"file store in {self._directory}: {error}") from error
        except ValueError as error:
            if not self._was_open:
                raise  # at the start, a mistake of the user
            raise StorageUnavailable(str(error)) from error
        raise StorageUnavailable(f"the folder {self._directory} is deleted again and again")

    def _opened(self) -> FileStore:
        with self._lock:
            if self._is_closed:
                raise StorageClosed(f"the file store in {self._directory} is closed")
            if self._store is None:
                self._store = FileStore(
                    self._directory, capacity_bytes=self._capacity_bytes, counters=self._counters
                )
            return self._store

    def _forget(self, store: FileStore) -> None:
        with self._lock:
            if self._store is store:
                self._store = None
                self._counters.add("reopened")
