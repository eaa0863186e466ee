"""A small file store and ways to look into its folder."""

from pathlib import Path

from storage_keys import make_buffers

from headwater.storage.backend import ReadStatus
from headwater.storage.file.backend import FileBackend

PAGE_BYTES = 4000  # with its header: one block


def open_store(directory: Path, *, num_pages: int = 1000) -> FileBackend:
    """Room for `num_pages` pages of one block each."""
    return FileBackend(directory, capacity_bytes=4096 * num_pages)


def read(backend, keys, pages) -> list[ReadStatus]:
    """Statuses of a `get`, after checking that every hit is the right page."""
    buffers = make_buffers(pages)
    statuses = backend.get(keys, buffers)
    assert all(s is not ReadStatus.HIT or b == p for s, b, p in zip(statuses, buffers, pages, strict=True))
    return statuses


def pages_on_disk(root: Path) -> int:
    return sum(len(path.name) == 32 and path.is_file() for path in root.glob("*/*/*"))
