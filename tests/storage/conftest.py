"""Stores for the tests: one Redis server for the session, everything else per test."""

from collections.abc import Iterator

import pytest
from redis_server import RedisServer
from stores_under_test import FolderStore, MemoryStore, RedisStore, StoreUnderTest

from headwater.storage.backend import StorageBackend


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    server = RedisServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(params=["memory", "file", "redis"])
def store(request: pytest.FixtureRequest, tmp_path) -> Iterator[StoreUnderTest]:
    match request.param:
        case "memory":
            yield MemoryStore()
        case "file":
            with pytest.MonkeyPatch.context() as patch:  # many who wait for a disk that takes a second to sync
                patch.setattr("headwater.storage.file.folder.LOCK_TIMEOUT_S", 120.0)
                yield FolderStore(tmp_path / "store")
        case _:
            server = request.getfixturevalue("shared_redis")
            with server.client() as client:
                client.flushall()
                yield RedisStore(client, server.url)


@pytest.fixture
def backend(store: StoreUnderTest) -> Iterator[StorageBackend]:
    backend = store.open()
    yield backend
    backend.close()
