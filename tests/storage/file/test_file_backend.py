"""The file store alone: its bound, what it evicts, restarts, lost and deleted state."""

import os
import shutil
import time
from pathlib import Path

import pytest
from file_store_helpers import PAGE_BYTES, open_store, pages_on_disk, read
from storage_keys import Tenant, make_fingerprint, make_pages

from headwater.storage.backend import ReadStatus, WriteStatus
from headwater.storage.errors import StorageError, StorageUnavailable
from headwater.storage.file import eviction as file_eviction
from headwater.storage.file import generations as file_generations
from headwater.storage.file import staging as file_staging
from headwater.storage.file.backend import FileBackend

HIT, MISS, STALE = ReadStatus.HIT, ReadStatus.MISS, ReadStatus.STALE
STORED, FULL = WriteStatus.STORED, WriteStatus.FULL


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def root(directory) -> Path:
    return directory / "headwater-kv-1"


# --- bounded size, least recently used -----------------------------------------------------------------


@pytest.fixture
def fine_time(monkeypatch):
    """Uses a millisecond apart count as apart."""
    monkeypatch.setattr(file_eviction, "WINDOW_NS", 10**6)


def test_the_store_never_grows_over_its_capacity(directory, root):
    backend = open_store(directory, num_pages=20)
    for text in range(20):
        backend.put(Tenant().keys(backend, 5, text=text), make_pages(5, page_bytes=PAGE_BYTES, seed=text))
        assert pages_on_disk(root) <= 20
        assert backend.usage().num_bytes <= 20 * 4096
    assert pages_on_disk(root) == 20, "and uses all of it"
    assert backend.counters()["evicted_pages"] == 80


def test_what_was_used_lately_stays(directory, fine_time):
    backend, pages = open_store(directory, num_pages=6), make_pages(2, page_bytes=PAGE_BYTES)
    texts = [Tenant().keys(backend, 2, text=text) for text in range(4)]
    for keys in texts[:3]:
        backend.put(keys, pages)
        time.sleep(0.003)
    assert read(backend, texts[0], pages) == [HIT] * 2
    time.sleep(0.003)
    backend.put(texts[3], pages)
    assert [backend.exists(keys)[0] for keys in texts] == [True, False, True, True]


def test_putting_what_is_there_is_a_use(directory, fine_time):
    backend, pages = open_store(directory, num_pages=4), make_pages(2, page_bytes=PAGE_BYTES)
    texts = [Tenant().keys(backend, 2, text=text) for text in range(3)]
    for text in (0, 1, 0, 2):
        backend.put(texts[text], pages)
        time.sleep(0.003)
    assert [backend.exists(keys)[0] for keys in texts] == [True, False, True]


def test_a_sequence_loses_its_tail_first(directory):
    """A prefix without its first page cannot be matched at all."""
    backend, pages = open_store(directory, num_pages=10), make_pages(10, page_bytes=PAGE_BYTES)
    long = Tenant().keys(backend, 10)
    backend.put(long[:5], pages[:5])  # in two batches, as chunked prefill does
    backend.put(long[5:], pages[5:])
    backend.put(Tenant("other").keys(backend, 4), pages[:4])
    held = backend.exists(long)
    assert held == sorted(held, reverse=True)
    assert 6 <= sum(held) < 10


def test_a_page_used_after_the_walk_that_chose_it_stays(directory, fine_time):
    """A walk chooses pages for many evictions; one of them may become the newest meanwhile."""
    backend, pages = open_store(directory, num_pages=5), make_pages(1, page_bytes=PAGE_BYTES)
    texts = [Tenant().keys(backend, 1, text=text) for text in range(7)]
    for keys in texts[:6]:  # the last of them walks, and evicts the first
        backend.put(keys, pages)
        time.sleep(0.003)
    assert read(backend, texts[1], pages) == [HIT]
    backend.put(texts[6], pages)
    assert [backend.exists(keys)[0] for keys in texts] == [False, True, False, True, True, True, True]


def test_the_order_of_use_outlives_a_restart(directory, fine_time):
    pages = make_pages(2, page_bytes=PAGE_BYTES)
    backend = open_store(directory, num_pages=4)
    texts = [Tenant().keys(backend, 2, text=text) for text in range(3)]
    backend.put(texts[1], pages)
    time.sleep(0.003)
    backend.put(texts[0], pages)
    backend.close()
    backend = open_store(directory, num_pages=4)
    time.sleep(0.003)
    backend.put(texts[2], pages)
    assert [backend.exists(keys)[0] for keys in texts] == [True, False, True]


def test_a_page_larger_than_the_store_is_refused(directory):
    backend = open_store(directory, num_pages=1)
    keys, small = Tenant().keys(backend, 2), make_pages(1, page_bytes=PAGE_BYTES)
    assert backend.put(keys[:1], small) == [STORED]
    assert backend.put(keys[1:], make_pages(1, page_bytes=5000)) == [FULL]
    assert read(backend, keys[:1], small) == [HIT], "nothing was evicted for nothing"


def test_a_smaller_store_shrinks_with_its_first_page(directory, root):
    backend = open_store(directory, num_pages=10)
    backend.put(Tenant().keys(backend, 10), make_pages(10, page_bytes=PAGE_BYTES))
    backend.close()
    backend = open_store(directory, num_pages=4)
    assert backend.put(Tenant("s").keys(backend, 1), make_pages(1, page_bytes=PAGE_BYTES)) == [STORED]
    assert pages_on_disk(root) == 4


def test_empty_buckets_are_taken_away_in_the_end(directory, root, monkeypatch):
    """One folder per tenant and generation would pile up."""
    backend, pages = open_store(directory, num_pages=2), make_pages(2, page_bytes=PAGE_BYTES)
    backend.put(Tenant("a").keys(backend, 2), pages)
    backend.put(Tenant("b").keys(backend, 2), pages)
    assert len(list((root / "buckets").iterdir())) == 2
    monkeypatch.setattr(file_eviction, "_EMPTY_BUCKET_AGE_S", -1.0)
    backend.close()
    backend = open_store(directory, num_pages=2)
    backend.reap(max_pages=10)
    assert len(list((root / "buckets").iterdir())) == 1
    assert list((root / "trash").iterdir()) == []
    assert read(backend, Tenant("b").keys(backend, 2), pages) == [HIT] * 2


def test_another_models_pages_are_evicted_like_ours(directory, fine_time):
    """The limit is the folder's, whoever wrote: else a second model could never store anything."""
    backend, pages = open_store(directory, num_pages=4), make_pages(4, page_bytes=PAGE_BYTES)
    backend.put(Tenant().keys(backend, 4), pages)
    time.sleep(0.003)
    other = Tenant(fingerprint=make_fingerprint(model_config_hash="config-2"))
    assert backend.put(other.keys(backend, 4), pages) == [STORED] * 4
    assert read(backend, Tenant().keys(backend, 4), pages) == [MISS] * 4


# --- restarts and lost state -----------------------------------------------------------------------------


def test_a_restart_keeps_pages_and_generations(directory):
    backend, pages = open_store(directory), make_pages(3)
    backend.raise_generation(Tenant().scope())
    generations = backend.generations([Tenant().scope()])
    keys = Tenant().keys(backend, 3)
    backend.put(keys, pages)
    backend.close()
    backend = open_store(directory)
    assert backend.generations([Tenant().scope()]) == generations
    assert read(backend, keys, pages) == [HIT] * 3
    assert backend.usage().num_pages == 3


def test_a_restart_after_a_flush_stays_flushed(directory):
    backend, pages = open_store(directory), make_pages(3)
    keys = Tenant().keys(backend, 3)
    backend.put(keys, pages)
    backend.raise_generation(Tenant().scope())
    backend.close()
    backend = open_store(directory)
    assert read(backend, keys, pages) == [STALE] * 3
    assert read(backend, Tenant().keys(backend, 3), pages) == [MISS] * 3


@pytest.mark.parametrize("content", [None, b"", b"short", bytes(100)], ids=["lost", "empty", "torn", "zeros"])
def test_lost_counters_make_everything_unreachable(directory, root, content):
    """Counters that began at 0 again would bring back what was flushed."""
    backend, pages = open_store(directory), make_pages(3)
    keys = Tenant().keys(backend, 3)
    backend.put(keys, pages)
    if content is None:
        (root / "generations").unlink()
    else:
        (root / "generations.new").write_bytes(content)
        (root / "generations.new").rename(root / "generations")
    for server in (backend, open_store(directory)):
        assert read(server, keys, pages) == [STALE] * 3
        assert read(server, Tenant().keys(server, 3), pages) == [MISS] * 3
    assert backend.reap(max_pages=10) == 3


def test_a_counter_is_on_disk_before_it_is_acknowledged(directory, monkeypatch):
    """Guards a flush that a power cut undoes: contents synced, then the rename, then the folder."""
    backend = open_store(directory)
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        events.append("sync folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "sync file")
        real_fsync(fd)

    def rename(*args, **kwargs) -> None:
        events.append("rename")
        real_rename(*args, **kwargs)

    monkeypatch.setattr(file_generations.os, "fsync", fsync)
    monkeypatch.setattr(file_generations.os, "rename", rename)
    backend.raise_generation(Tenant().scope())
    assert events == ["sync file", "rename", "sync folder"]


def test_a_lost_ledger_is_counted_anew(directory, root):
    backend = open_store(directory)
    backend.put(Tenant().keys(backend, 5), make_pages(5, page_bytes=PAGE_BYTES))
    backend.close()
    (root / "usage").unlink()
    backend = open_store(directory)
    assert (backend.usage().num_pages, backend.usage().num_bytes) == (5, 5 * 4096)


def test_a_ledger_that_is_wrong_is_mended_in_the_background(directory, root):
    """A process killed between reserving and writing leaves it too high; the store must not shrink for ever."""
    backend = open_store(directory)
    backend.put(Tenant().keys(backend, 5), make_pages(5, page_bytes=PAGE_BYTES))
    for path in root.glob("buckets/*/*"):
        if path.name != "record":
            path.unlink()
    backend.close()
    backend = open_store(directory)
    assert backend.usage().num_pages == 5
    backend.reap(max_pages=10)
    assert (backend.usage().num_pages, backend.usage().num_bytes) == (0, 0)


@pytest.mark.parametrize("what", ["", "headwater-kv-1", "headwater-kv-1/buckets", "headwater-kv-1/staging"])
def test_a_deleted_folder_means_misses_and_is_made_anew(directory, what):
    backend, pages = open_store(directory), make_pages(3)
    keys = Tenant().keys(backend, 3)
    backend.put(keys, pages)
    shutil.rmtree(directory / what)
    assert HIT not in read(backend, keys, pages) or what.endswith("staging")
    fresh = Tenant().keys(backend, 3, text=1)
    assert backend.put(fresh, pages) == [STORED] * 3
    assert read(backend, fresh, pages) == [HIT] * 3
    assert backend.raise_generation(Tenant().scope()) > 0


def test_a_deleted_bucket_is_made_anew(directory, root):
    backend, pages = open_store(directory), make_pages(3)
    keys = Tenant().keys(backend, 3)
    backend.put(keys, pages)
    shutil.rmtree(root / "buckets" / keys[0].bucket.id.hex())
    assert read(backend, keys, pages) == [MISS] * 3
    assert backend.put(keys, pages) == [STORED] * 3


def test_a_bucket_that_another_server_makes_at_the_same_moment_is_shared(directory, monkeypatch):
    backend, other, pages = open_store(directory), open_store(directory), make_pages(2)
    keys = Tenant().keys(backend, 2)
    real_make_folder = file_staging.Staging.make_folder

    def make_folder(self) -> str:
        monkeypatch.setattr(file_staging.Staging, "make_folder", real_make_folder)
        other.put(keys[:1], pages[:1])  # between looking and making
        return real_make_folder(self)

    monkeypatch.setattr(file_staging.Staging, "make_folder", make_folder)
    assert backend.put(keys, pages) == [WriteStatus.PRESENT, STORED]
    assert read(other, keys, pages) == [HIT] * 2


def test_a_strangers_folder_in_its_place_is_an_error_that_workers_know(directory, root):
    """ValueError is for the user who starts a server; a running one must see a StorageError."""
    backend = open_store(directory)
    shutil.rmtree(root)
    root.mkdir()
    (root / "thesis.txt").write_text("mine")
    with pytest.raises(StorageUnavailable, match="not a store of ours"):
        backend.usage()
    (root / "thesis.txt").unlink()
    assert backend.usage().num_pages == 0


def test_a_deleted_folder_is_noticed_by_usage(directory):
    backend = open_store(directory)
    backend.put(Tenant().keys(backend, 3), make_pages(3))
    shutil.rmtree(directory)
    assert backend.usage().num_pages == 0


def test_no_folder_is_made_outside_of_one_that_exists(tmp_path: Path) -> None:
    """A mistyped path used to make every folder of it."""
    wrong = tmp_path / "not" / "there"
    with pytest.raises(ValueError, match=r"the folder .*not does not exist"):
        FileBackend(wrong, capacity_bytes=1 << 20)
    assert not (tmp_path / "not").exists()
    FileBackend(tmp_path / "new", capacity_bytes=1 << 20).close()
    assert (tmp_path / "new").is_dir()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises((ValueError, StorageError)):
            FileBackend(place, capacity_bytes=1 << 20)
