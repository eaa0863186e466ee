"""Several processes in one folder, some of them killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from storage_keys import Tenant, make_buffers
from store_worker import BLOCK_BYTES, PAGES_OF_TEXT, pages_of

from headwater.storage.backend import ReadStatus, WriteStatus
from headwater.storage.file.backend import FileBackend

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("store_worker.py")


def start(directory: Path, role: str, *, num_pages: int = 1000, seed: int = 0) -> subprocess.Popen:
    command = [sys.executable, str(WORKER), str(directory), role, str(num_pages), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read_line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "store"


def page_paths(directory: Path) -> list[Path]:
    """Those of folders that a reaper deletes meanwhile are left out: `os.walk` goes on, `Path.glob` would raise."""
    found = os.walk(directory / "headwater-kv-1" / "buckets")
    return [Path(folder) / name for folder, _, names in found for name in names if name != "record"]


def staged(directory: Path) -> list[Path]:
    return list((directory / "headwater-kv-1" / "staging").glob("*.staged"))


def test_processes_share_a_small_folder(directory):
    """Two processes write, read, evict and flush: every hit is right, and the limit holds for both together."""
    processes = [start(directory, "mix", num_pages=30, seed=seed) for seed in range(2)]
    try:
        found = [json.loads(read_line(process)) for process in processes]
    finally:
        for process in processes:
            end(process)
    for counts in found:
        assert (counts["wrong"], counts["corrupt"], counts["over capacity"]) == (0, 0, 0)
        assert counts["hit"] > 20
        assert counts["stored"] > 20
    assert len(page_paths(directory)) <= 30
    backend = FileBackend(directory, capacity_bytes=30 * BLOCK_BYTES)
    backend.reap(max_pages=1000)
    assert backend.usage().num_pages == len(page_paths(directory))


def test_counters_of_several_processes_add_up(directory):
    """A lost update would be a flush that did nothing."""
    processes = [start(directory, "raise") for _ in range(3)]
    try:
        raised = [json.loads(read_line(process)) for process in processes]
    finally:
        for process in processes:
            end(process)
    numbers = sorted(number for one in raised for number in one)
    assert numbers == list(range(numbers[0], numbers[0] + 60))


def test_killed_in_the_middle_of_a_page(directory):
    """The half page is never visible, and its file and its reservation do not stay."""
    process = start(directory, "middle")
    try:
        assert read_line(process) == "in the middle\n"
        backend = FileBackend(directory, capacity_bytes=1000 * BLOCK_BYTES)
        assert len(staged(directory)) == 1
        backend.reap(max_pages=1)
        assert len(staged(directory)) == 1, "its writer is alive: not ours to delete"
    finally:
        end(process)
    pages = pages_of(0)
    keys, buffers = Tenant().keys(backend, PAGES_OF_TEXT), make_buffers(pages)
    assert backend.get(keys, buffers) == [ReadStatus.HIT] * 2 + [ReadStatus.MISS] * 4
    assert buffers[:2] == pages[:2]
    backend.close()
    backend = FileBackend(directory, capacity_bytes=1000 * BLOCK_BYTES)
    assert backend.usage().num_pages == 3, "the reservation of the page that never came"
    backend.reap(max_pages=1)
    assert staged(directory) == []
    assert backend.usage().num_pages == 2
    assert backend.put(keys, pages) == [WriteStatus.PRESENT] * 2 + [WriteStatus.STORED] * 4


def test_killed_at_random_moments_no_partial_page_is_visible(directory):
    for turn in range(6):
        process = start(directory, "write", num_pages=200)
        try:
            read_line(process)
            while turn == 0 and not page_paths(directory):  # a busy machine may not let it write one in that time
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(0.01 + 0.013 * turn)
        finally:
            end(process)
    backend = FileBackend(directory, capacity_bytes=200 * BLOCK_BYTES)
    num_hits = 0
    for text in range(300):
        pages = pages_of(text)
        buffers = make_buffers(pages)
        statuses = backend.get(Tenant().keys(backend, PAGES_OF_TEXT, text=text), buffers)
        for status, buffer, page in zip(statuses, buffers, pages, strict=True):
            assert status in (ReadStatus.HIT, ReadStatus.MISS)
            assert status is ReadStatus.MISS or buffer == page
            num_hits += status is ReadStatus.HIT
    assert num_hits == len(page_paths(directory)) > 0
    backend.reap(max_pages=1)
    assert staged(directory) == []
    assert backend.usage().num_pages == num_hits
