"""A disk that is really full: a small tmpfs, where the machine lets us mount one."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from storage_keys import Tenant, make_buffers, make_pages

from headwater.storage.backend import ReadStatus, WriteStatus
from headwater.storage.errors import StorageFull
from headwater.storage.file.backend import FileBackend

SIZE_BYTES = 4 << 20
PAGE_BYTES = 100_000


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    target = tmp_path / "disk"
    target.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if mount is None or umount is None:
        pytest.skip("no mount command here; test_file_hazards.py has the same with scripted errors")
    command = [mount, "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", str(target)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here ({mounted.stderr.strip()}); see test_file_hazards.py")
    try:
        yield target
    finally:
        subprocess.run([umount, "--lazy", str(target)], check=True)


def test_a_full_disk_stops_writes_only(small_disk):
    """Reads, flushes and reaping go on, and writes do again once there is room."""
    backend = FileBackend(small_disk / "store", capacity_bytes=1 << 30)
    keys, pages = Tenant().keys(backend, 60), make_pages(60, page_bytes=PAGE_BYTES)
    written = backend.put(keys, pages)
    num_stored = written.count(WriteStatus.STORED)
    assert set(written) == {WriteStatus.STORED, WriteStatus.FULL}
    assert 30 < num_stored < 42
    buffers = make_buffers(pages)
    statuses = backend.get(keys, buffers)
    for status, found, buffer, page in zip(statuses, written, buffers, pages, strict=True):
        assert (status is ReadStatus.HIT) == (found is WriteStatus.STORED)
        assert status is not ReadStatus.HIT or buffer == page
    assert backend.usage().num_pages == num_stored
    (small_disk / "filler").write_bytes(b"")
    with open(small_disk / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            pass  # not a byte is left now
    backend.raise_generation(Tenant().scope())
    assert backend.get(keys, buffers) == [ReadStatus.STALE] * 60
    while backend.reap(max_pages=10):
        pass
    assert backend.usage().num_pages == 0
    keys = Tenant().keys(backend, 20)
    assert backend.put(keys, pages[:20]) == [WriteStatus.STORED] * 20
    backend.close()


def test_a_store_does_not_open_on_a_full_disk_but_says_why(small_disk):
    with open(small_disk / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            pass
    with pytest.raises(StorageFull, match="No space left"):
        FileBackend(small_disk / "store", capacity_bytes=1 << 30)
