"""Each kind of store behind one face, for the tests that every backend must pass."""

from pathlib import Path
from typing import Protocol

import redis

from headwater.storage.backend import StorageBackend
from headwater.storage.file.backend import FileBackend
from headwater.storage.memory import MemoryBackend
from headwater.storage.page_key import PageKey
from headwater.storage.redis.backend import RedisBackend
from headwater.storage.redis.layout import page_name

CAPACITY_BYTES = 64 << 20


class StoreUnderTest(Protocol):
    def open(self) -> StorageBackend:
        """Another server's backend on the same store."""
        ...

    def stored_bytes(self, key: PageKey) -> bytes: ...

    def overwrite(self, key: PageKey, content: bytes) -> None:
        """Replace what is stored for a page, behind the backend's back."""
        ...


class MemoryStore:
    def __init__(self) -> None:
        self._backend = MemoryBackend(capacity_bytes=CAPACITY_BYTES)

    def open(self) -> StorageBackend:
        return self._backend  # in one process: it cannot be opened twice

    def stored_bytes(self, key: PageKey) -> bytes:
        return bytes(self._backend._pages[key])

    def overwrite(self, key: PageKey, content: bytes) -> None:
        self._backend._pages[key][:] = content


class FolderStore:
    def __init__(self, directory: Path, *, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self.directory = directory
        self._capacity_bytes = capacity_bytes

    def open(self) -> StorageBackend:
        return FileBackend(self.directory, capacity_bytes=self._capacity_bytes)

    def path(self, key: PageKey) -> Path:
        return self.directory / "headwater-kv-1" / "buckets" / key.bucket.id.hex() / key.page.hex()

    def stored_bytes(self, key: PageKey) -> bytes:
        return self.path(key).read_bytes()

    def overwrite(self, key: PageKey, content: bytes) -> None:
        self.path(key).write_bytes(content)


class RedisStore:
    def __init__(self, client: redis.Redis, url: str) -> None:
        self.client = client
        self._url = url

    def open(self) -> StorageBackend:
        return RedisBackend(self._url)

    def stored_bytes(self, key: PageKey) -> bytes:
        return self.client.get(page_name(key))

    def overwrite(self, key: PageKey, content: bytes) -> None:
        self.client.set(page_name(key), content)
