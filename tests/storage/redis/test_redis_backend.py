"""The Redis store alone: crashes, old snapshots, full memory, hanging servers, keys of others."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis_server import RedisServer
from storage_keys import Tenant, make_buffers, make_pages

from headwater.storage.backend import ReadStatus, WriteStatus
from headwater.storage.errors import StorageTimeout, StorageUnavailable
from headwater.storage.redis import keyspace as redis_keyspace
from headwater.storage.redis.backend import RedisBackend
from headwater.storage.redis.layout import BUCKETS, GENERATIONS, PORTION_BYTES, page_name, portions

HIT, MISS, STALE = ReadStatus.HIT, ReadStatus.MISS, ReadStatus.STALE
STORED, FULL = WriteStatus.STORED, WriteStatus.FULL


@pytest.fixture
def backend(shared_redis: RedisServer) -> Iterator[RedisBackend]:
    with shared_redis.client() as client:
        client.flushall()
    backend = RedisBackend(shared_redis.url)
    yield backend
    backend.close()


@pytest.fixture
def client(shared_redis: RedisServer):
    with shared_redis.client() as client:
        yield client


@pytest.fixture
def own_server() -> Iterator:
    """Makes servers with the options a test needs."""
    servers: list[RedisServer] = []

    def make(*options: str, preload: Path | None = None) -> RedisServer:
        servers.append(RedisServer(*options, preload=preload))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def read(backend, keys, pages):
    buffers = make_buffers(pages)
    statuses = backend.get(keys, buffers)
    assert all(s is not HIT or b == p for s, b, p in zip(statuses, buffers, pages, strict=True))
    return statuses


# --- crashes and restarts ---------------------------------------------------------------------------------


def test_a_killed_server_is_unavailable_and_works_again_after_its_restart(own_server):
    server = own_server()
    backend, pages = RedisBackend(server.url), make_pages(3)
    keys = Tenant().keys(backend, 3)
    backend.put(keys, pages)
    server.kill()
    for call in (
        lambda: read(backend, keys, pages),
        lambda: backend.put(keys, pages),
        lambda: backend.raise_generation(Tenant().scope()),
    ):
        with pytest.raises(StorageUnavailable):
            call()
    server.start()
    assert read(backend, keys, pages) == [STALE] * 3, "its memory is lost, and with it the counters"
    keys = Tenant().keys(backend, 3)
    assert backend.put(keys, pages) == [STORED] * 3
    assert read(backend, keys, pages) == [HIT] * 3
    backend.close()


def test_an_old_snapshot_does_not_undo_a_flush(own_server):
    """The snapshot has the pages and the counter of before the flush: both would match."""
    server = own_server()
    backend, pages = RedisBackend(server.url), make_pages(3)
    keys = Tenant().keys(backend, 3)
    backend.put(keys, pages)
    with server.client() as client:
        client.save()
        backend.raise_generation(Tenant().scope())
        server.kill()
        server.start()
        assert client.exists(*map(page_name, keys)) == 3, "the old pages are back"
    for server_backend in (backend, RedisBackend(server.url)):
        assert read(server_backend, keys, pages) == [STALE] * 3
        assert read(server_backend, Tenant().keys(server_backend, 3), pages) == [MISS] * 3
        server_backend.close()
    reaper = RedisBackend(server.url)
    assert reaper.reap(max_pages=10) == 3
    reaper.close()


def test_a_server_with_an_append_only_file_stays_warm_and_flushed(own_server):
    server = own_server("--appendonly", "yes")
    backend, pages = RedisBackend(server.url), make_pages(3)
    flushed, kept = Tenant("s"), Tenant("t")
    for owner in (flushed, kept):
        backend.put(owner.keys(backend, 3), pages)
    old_keys = flushed.keys(backend, 3)
    raised = backend.raise_generation(flushed.scope(cache_salt="s"))
    server.kill()
    server.start()
    assert backend.generations([flushed.scope(cache_salt="s")]) == (raised,)
    assert read(backend, old_keys, pages) == [STALE] * 3
    assert read(backend, kept.keys(backend, 3), pages) == [HIT] * 3
    backend.close()


@pytest.fixture
def slow_disk(tmp_path: Path) -> Path:
    """A library with which the thread that syncs files takes half a minute for each."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    source = tmp_path / "slow.c"
    source.write_text(
        "#define _GNU_SOURCE\n#include <unistd.h>\n"
        "int fdatasync(int fd) { if (gettid() != getpid()) sleep(30); return 0; }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", source.with_suffix(".so")], check=True)
    return source.with_suffix(".so")


def wait_until_syncing(server: RedisServer) -> None:
    give_up_s = time.monotonic() + 60
    with server.client() as client:
        while not client.info("persistence")["aof_pending_bio_fsync"]:
            assert time.monotonic() < give_up_s
            client.incr("other")
            time.sleep(0.02)


def test_a_flush_is_acknowledged_when_the_append_only_file_has_it(own_server, slow_disk):
    """While an earlier part of the file is synced, the server answers first and writes later."""
    server = own_server("--appendonly", "yes", "--appendfsync", "everysec", preload=slow_disk)
    backend, pages = RedisBackend(server.url), make_pages(3)
    scope = Tenant("s").scope(cache_salt="s")
    old_keys = Tenant("s").keys(backend, 3)
    backend.put(old_keys, pages)
    wait_until_syncing(server)
    raised = backend.raise_generation(scope)
    server.kill()
    server.start()
    assert backend.generations([scope]) == (raised,)
    assert read(backend, old_keys, pages) == [STALE] * 3
    backend.close()


def test_a_flush_that_the_append_only_file_does_not_take_is_an_error(own_server, slow_disk):
    server = own_server("--appendonly", "yes", "--appendfsync", "everysec", preload=slow_disk)
    wait_until_syncing(server)
    backend = RedisBackend(server.url, timeout_s=0.2)
    with pytest.raises(StorageUnavailable, match="append-only file"):
        backend.raise_generation(Tenant().scope())
    backend.close()


@pytest.mark.parametrize("how", ["flushall", "evicted"])
def test_lost_counters_make_everything_unreachable(backend, client, how):
    """Counters that began at 0 again would bring back what was flushed. The connection lives on meanwhile."""
    pages = make_pages(3)
    keys = Tenant().keys(backend, 3)
    backend.put(keys, pages)
    if how == "flushall":
        client.flushall()
    else:
        client.delete(GENERATIONS)
    assert read(backend, keys, pages) == [STALE] * 3
    assert backend.reap(max_pages=10) == 0, "without counters nothing is known to be old"
    fresh = Tenant().keys(backend, 3)
    assert read(backend, fresh, pages) == [MISS] * 3
    assert backend.put(fresh, pages) == [STORED] * 3
    assert read(backend, fresh, pages) == [HIT] * 3
    client.delete(GENERATIONS)
    assert backend.raise_generation(Tenant().scope()) > 0
    assert read(backend, fresh, pages) == [STALE] * 3


@pytest.mark.timeout(30)
def test_a_server_that_does_not_answer_is_a_timeout(own_server):
    server = own_server()
    backend, pages = RedisBackend(server.url, timeout_s=0.1), make_pages(1)
    keys = Tenant().keys(backend, 1)
    backend.put(keys, pages)
    server.stop_answering()
    try:
        began_s = time.monotonic()
        with pytest.raises(StorageTimeout):
            read(backend, keys, pages)
        assert time.monotonic() - began_s < 5
    finally:
        server.answer_again()
    assert read(backend, keys, pages) == [HIT]
    backend.close()


def test_nothing_is_sent_before_the_first_call():
    """A store that is down must not stop a server from starting."""
    backend = RedisBackend("unix:///nowhere/at/all")
    with pytest.raises(StorageUnavailable):
        backend.generations([b"s" * 16])
    backend.close()


# --- limits -----------------------------------------------------------------------------------------------


def test_full_memory_refuses_pages_and_serves_the_others(own_server):
    server = own_server("--maxmemory", "6mb", "--maxmemory-policy", "noeviction")
    backend, pages = RedisBackend(server.url), make_pages(80, page_bytes=100_000)
    keys = Tenant().keys(backend, 80)
    written = backend.put(keys, pages)
    assert set(written) == {STORED, FULL}
    assert read(backend, keys, pages) == [HIT if status is STORED else MISS for status in written]
    assert backend.usage().capacity_bytes == 6 << 20
    backend.close()


def fill_over_the_brim(server: RedisServer, backend: RedisBackend, pages: list[memoryview]) -> None:
    """Store pages, then lower the server's limit to below what they use: it takes nothing any more."""
    keys = Tenant().keys(backend, len(pages))
    assert backend.put(keys, pages) == [STORED] * len(pages)
    with server.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 500_000)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("probe", "x")


def test_full_memory_can_be_flushed(own_server):
    """A flush must not fail because of what it is to flush."""
    server, pages = own_server(), make_pages(40, page_bytes=100_000)
    backend = RedisBackend(server.url)
    fill_over_the_brim(server, backend, pages)
    backend.raise_generation(Tenant().scope())
    assert HIT not in read(backend, Tenant().keys(backend, 40), pages)
    while backend.reap(max_pages=10):
        pass
    keys = Tenant().keys(backend, 10)
    assert backend.put(keys, pages[:10]) == [STORED] * 10
    backend.close()


def test_a_new_connection_works_when_memory_is_full(own_server):
    """Connecting may have to write the counters anew: full memory must not lock us out."""
    server, pages = own_server(), make_pages(40, page_bytes=100_000)
    first = RedisBackend(server.url)
    fill_over_the_brim(server, first, pages)
    with server.client() as client:
        client.delete(GENERATIONS)
    second = RedisBackend(server.url)
    assert len(second.generations([Tenant().scope()])) == 1
    first.close()
    second.close()


def test_our_own_limit_is_kept_without_one_of_the_server(shared_redis, client):
    client.flushall()
    limit = client.info("memory")["used_memory"] + 1_000_000
    backend, pages = RedisBackend(shared_redis.url, capacity_bytes=limit), make_pages(30, page_bytes=100_000)
    keys = Tenant().keys(backend, 30)
    written = [backend.put([key], [page])[0] for key, page in zip(keys, pages, strict=True)]
    assert 5 <= written.count(STORED) <= 10
    assert written[-1] is FULL
    assert backend.usage().capacity_bytes == limit
    backend.close()


def test_each_use_renews_the_time_to_live(shared_redis, client):
    client.flushall()
    backend, pages = RedisBackend(shared_redis.url, ttl_s=100), make_pages(2)
    keys = Tenant().keys(backend, 2)
    backend.put(keys, pages)
    names = [page_name(key) for key in keys]
    assert all(90 < client.ttl(name) <= 100 for name in names)
    for name in names:
        client.expire(name, 10)
    read(backend, keys[:1], pages[:1])
    backend.put(keys[1:], pages[1:])
    assert all(90 < client.ttl(name) <= 100 for name in names)
    backend.close()


def test_without_a_time_to_live_pages_stay(shared_redis, client):
    client.flushall()
    backend, pages = RedisBackend(shared_redis.url, ttl_s=None), make_pages(1)
    keys = Tenant().keys(backend, 1)
    backend.put(keys, pages)
    assert read(backend, keys, pages) == [HIT]
    assert client.ttl(page_name(keys[0])) == -1
    backend.close()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([PORTION_BYTES * 3], [range(0, 1)]),
        ([1, PORTION_BYTES, 1], [range(0, 1), range(1, 2), range(2, 3)]),
        ([PORTION_BYTES // 2] * 5, [range(0, 2), range(2, 4), range(4, 5)]),
    ],
)
def test_long_batches_are_cut_into_portions(sizes, expected):
    assert list(portions(sizes)) == expected


# --- sharing a server -------------------------------------------------------------------------------------


def test_keys_of_others_are_left_alone(backend, client):
    client.set("session:1", "theirs")
    client.set("headwater:other", "theirs")
    pages = make_pages(3)
    backend.put(Tenant().keys(backend, 3), pages)
    assert backend.usage().num_pages == 3
    backend.raise_generation(Tenant().scope())
    while backend.reap(max_pages=10):
        pass
    assert client.mget("session:1", "headwater:other") == [b"theirs", b"theirs"]
    assert sorted(client.keys("headwater:kv:*")) == [GENERATIONS]


def test_reaping_goes_on_over_a_large_keyspace(backend, client, monkeypatch):
    """More keys than one scan returns, several flushes, a late write between two portions."""
    monkeypatch.setattr(redis_keyspace, "SCAN_COUNT", 20)
    pages = make_pages(60, page_bytes=10)
    flushed, late, kept = Tenant("s"), Tenant("t"), Tenant("u")
    for owner in (flushed, late, kept):
        backend.put(owner.keys(backend, 60), pages)
    backend.raise_generation(Tenant().scope(cache_salt="s"))
    num_reaped = backend.reap(max_pages=25)
    assert num_reaped == 25
    old_keys = late.keys(backend, 60)
    backend.raise_generation(Tenant().scope(cache_salt="t"))
    while portion := backend.reap(max_pages=25):
        assert portion <= 25
        num_reaped += portion
    assert num_reaped == 120
    assert backend.exists(kept.keys(backend, 60)) == [True] * 60
    assert client.hlen(BUCKETS) == 1
    assert backend.exists(old_keys) == [False] * 60


def test_usage_sees_what_other_servers_stored_in_the_end(backend, shared_redis, monkeypatch):
    other = RedisBackend(shared_redis.url)
    assert other.usage().num_pages == 0
    backend.put(Tenant().keys(backend, 5), make_pages(5))
    monkeypatch.setattr(redis_keyspace, "COUNT_AGE_S", 0.0)
    assert (other.usage().num_pages, other.usage().num_bytes) == (5, 5 * 1096)
    other.close()


def test_password_and_database_come_from_the_url(own_server):
    server = own_server("--requirepass", "geheim", "--protected-mode", "no")
    backend, pages = RedisBackend(f"{server.url}?db=3&password=geheim"), make_pages(1)
    keys = Tenant().keys(backend, 1)
    assert backend.put(keys, pages) == [STORED]
    other_database = RedisBackend(f"{server.url}?password=geheim")
    assert HIT not in read(other_database, keys, pages)
    wrong = RedisBackend(f"{server.url}?password=falsch")
    with pytest.raises(StorageUnavailable) as caught:
        read(wrong, keys, pages)
    assert "falsch" not in str(caught.value)
    for opened in (backend, other_database, wrong):
        opened.close()
