"""The file store among strangers: links and files of others, full and failing disks, locks that are held."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest
from file_store_helpers import PAGE_BYTES, open_store, pages_on_disk, read
from storage_keys import Tenant, make_pages
from stores_under_test import FolderStore

from headwater.bench.machine import open_files
from headwater.storage.backend import ReadStatus, WriteStatus
from headwater.storage.errors import StorageFull, StorageTimeout, StorageUnavailable
from headwater.storage.file import staging as file_staging

HIT, MISS, STALE = ReadStatus.HIT, ReadStatus.MISS, ReadStatus.STALE
STORED, FULL, SKIPPED = WriteStatus.STORED, WriteStatus.FULL, WriteStatus.SKIPPED


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def root(directory) -> Path:
    return directory / "headwater-kv-1"


# --- nothing leaves the folder, nothing of others is touched ------------------------------------------------


def test_a_folder_with_other_files_is_refused(root):
    root.mkdir(parents=True)
    (root / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a store of ours"):
        open_store(root.parent)
    assert (root / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("make", ["link", "file"])
def test_a_link_or_file_in_place_of_the_folder_is_refused(directory, root, tmp_path, make):
    directory.mkdir()
    (tmp_path / "elsewhere").mkdir()
    root.symlink_to(tmp_path / "elsewhere") if make == "link" else root.write_text("x")
    with pytest.raises(ValueError, match="must be a folder, not a link or a file"):
        open_store(directory)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_links_inside_the_store_lead_nowhere(directory, root, tmp_path):
    """Someone who can write into the folder must not make us read, write or delete outside of it."""
    backend, pages = open_store(directory), make_pages(2)
    keys = Tenant().keys(backend, 2)
    backend.put(keys, pages)
    outside = tmp_path / "outside"
    shutil.copytree(root / "buckets" / keys[0].bucket.id.hex(), outside)
    before = sorted((path.name, path.read_bytes()) for path in outside.iterdir())
    shutil.rmtree(root / "buckets" / keys[0].bucket.id.hex())
    (root / "buckets" / keys[0].bucket.id.hex()).symlink_to(outside)
    (root / "trash" / ("a" * 32 + "-x")).symlink_to(outside)
    (root / "staging" / "dead-1.staged").symlink_to(outside)
    assert read(backend, keys, pages) == [MISS] * 2
    assert backend.put(keys, pages) == [SKIPPED] * 2
    assert backend.delete(keys) == 0
    backend.raise_generation(Tenant().scope())
    assert backend.reap(max_pages=100) == 0
    assert sorted((path.name, path.read_bytes()) for path in outside.iterdir()) == before


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_file_in_place_of_a_page_is_a_miss(directory, kind):
    """A pipe must not block the reader, a link not be followed."""
    backend, pages = open_store(directory), make_pages(1)
    keys = Tenant().keys(backend, 1)
    backend.put(keys, pages)
    path = FolderStore(directory).path(keys[0])
    target = path.with_name("moved")
    path.rename(target)
    match kind:
        case "link":
            path.symlink_to(target)
        case "pipe":
            os.mkfifo(path)
        case _:
            path.mkdir()
    assert HIT not in read(backend, keys, pages)
    assert backend.exists(keys) == [False]
    assert STORED not in backend.put(keys, pages) or kind != "folder"


def test_files_of_others_survive_eviction_and_reaping(directory, root):
    backend, pages = open_store(directory, num_pages=4), make_pages(4, page_bytes=PAGE_BYTES)
    keys = Tenant().keys(backend, 4)
    backend.put(keys, pages)
    bucket = root / "buckets" / keys[0].bucket.id.hex()
    (bucket / "notes.txt").write_text("mine")
    (root / "notes.txt").write_text("mine")
    (root / "staging" / "notes.txt").write_text("mine")
    backend.put(Tenant("s").keys(backend, 4), pages)
    backend.raise_generation(Tenant().scope())
    while backend.reap(max_pages=10):
        pass
    assert len([path for path in root.rglob("notes.txt") if path.read_text() == "mine"]) == 3


def test_pages_are_for_their_owner_only(directory, root):
    backend = open_store(directory)
    keys = Tenant().keys(backend, 1)
    backend.put(keys, make_pages(1))
    assert root.stat().st_mode & 0o077 == 0
    assert FolderStore(directory).path(keys[0]).stat().st_mode & 0o077 == 0


def test_a_bucket_of_unknown_origin_is_not_reaped(directory, root):
    """Its record may be of a newer version: only what is known to be unreachable may go."""
    backend, pages = open_store(directory), make_pages(2)
    keys = Tenant().keys(backend, 2)
    backend.put(keys, pages)
    (root / "buckets" / keys[0].bucket.id.hex() / "record").write_bytes(b"\x95 something else")
    backend.raise_generation(Tenant().scope())
    assert backend.reap(max_pages=10) == 0
    assert pages_on_disk(root) == 2


# --- full and failing disks ---------------------------------------------------------------------------------


def fail_writes(monkeypatch, code: int, *, times: int, after_bytes: int = 100) -> None:
    """The next `times` files take `after_bytes` and then fail, as a disk does that fills up."""
    left = [times]
    real_writev = os.writev

    def writev(fd, views):
        if left[0] == 0:
            return real_writev(fd, views)
        if os.fstat(fd).st_size == 0:
            return os.write(fd, b"".join(views)[:after_bytes])
        left[0] -= 1
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(file_staging.os, "writev", writev)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_refuses_pages_and_serves_the_others(directory, root, monkeypatch, code):
    backend, pages = open_store(directory), make_pages(4)
    keys = Tenant().keys(backend, 4)
    backend.put(keys[:2], pages[:2])
    fail_writes(monkeypatch, code, times=1)
    assert backend.put(keys[2:], pages[2:]) == [FULL, STORED]
    assert read(backend, keys, pages) == [HIT, HIT, MISS, HIT]
    assert backend.usage().num_pages == pages_on_disk(root) == 3
    assert [path for path in (root / "staging").iterdir() if path.suffix != ".lock"] == []


def test_a_failing_disk_is_an_error_that_leaves_nothing(directory, root, monkeypatch):
    backend, pages = open_store(directory), make_pages(2)
    keys = Tenant().keys(backend, 2)
    backend.put(keys[:1], pages[:1])
    fail_writes(monkeypatch, errno.EIO, times=1)
    with pytest.raises(StorageUnavailable):
        backend.put(keys[1:], pages[1:])
    assert [path for path in (root / "staging").iterdir() if path.suffix != ".lock"] == []
    assert backend.usage().num_pages == pages_on_disk(root) == 1


def test_a_flush_makes_its_own_room_on_a_full_disk(directory, monkeypatch):
    backend, pages = open_store(directory), make_pages(3)
    keys = Tenant().keys(backend, 3)
    backend.put(keys, pages)
    fail_writes(monkeypatch, errno.ENOSPC, times=1, after_bytes=10)
    backend.raise_generation(Tenant().scope())
    assert read(backend, keys, pages) == [STALE] * 3
    assert backend.counters()["evicted_pages"] == 3


def test_a_flush_that_cannot_be_written_fails_and_changes_nothing(directory, monkeypatch):
    backend, pages = open_store(directory), make_pages(1)
    keys = Tenant("s").keys(backend, 1)
    fail_writes(monkeypatch, errno.ENOSPC, times=2, after_bytes=10)
    before = backend.generations([Tenant().scope()])
    with pytest.raises(StorageFull):
        backend.raise_generation(Tenant().scope())
    assert backend.generations([Tenant().scope()]) == before
    backend.put(keys, pages)
    assert backend.raise_generation(Tenant().scope()) == before[0] + 1
    assert read(backend, keys, pages) == [STALE]


def test_a_lock_held_for_ever_is_a_timeout(directory, root, monkeypatch):
    """A hanging process must not hang all others."""
    monkeypatch.setattr("headwater.storage.file.folder.LOCK_TIMEOUT_S", 0.05)
    backend, pages = open_store(directory), make_pages(1)
    keys = Tenant().keys(backend, 1)
    backend.put(keys, pages)
    with open(root / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageTimeout):
            backend.raise_generation(Tenant().scope())
        assert read(backend, keys, pages) == [HIT], "reading needs no lock"
    backend.raise_generation(Tenant().scope())


def test_files_are_closed_again(directory):
    def num_open() -> int:  # of the store's: other tests of this process may be closing theirs
        return sum(name.startswith(str(directory)) for name in open_files(os.getpid()))

    for turn in range(5):
        backend = open_store(directory)
        keys, pages = Tenant().keys(backend, 3, text=turn), make_pages(3)
        backend.put(keys, pages)
        read(backend, keys, pages)
        backend.raise_generation(Tenant().scope())
        backend.reap(max_pages=10)
        shutil.rmtree(directory)
        backend.put(keys, pages)
        backend.close()
        assert num_open() == 0
