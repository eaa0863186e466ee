"""A process that uses a file store, for the multi-process tests: store_worker.py DIRECTORY ROLE NUM_PAGES SEED.

It prints a line when it is ready and a line of JSON at its end.
"""

import json
import os
import random
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # run as a script: the helpers of all stores lie above
from storage_keys import Tenant, make_buffers, make_pages

from headwater.storage.backend import ReadStatus, WriteStatus
from headwater.storage.file import folder as file_folder
from headwater.storage.file import staging as file_staging
from headwater.storage.file.backend import FileBackend
from headwater.storage.file.folder import StoreFolder

PAGE_BYTES = 8000  # with its header: two blocks
BLOCK_BYTES = 8192
NUM_TEXTS = 12
PAGES_OF_TEXT = 6


def pages_of(text: int) -> list[memoryview]:
    return make_pages(PAGES_OF_TEXT, page_bytes=PAGE_BYTES, seed=text)


def count_pages(folder: StoreFolder) -> int:
    """Page files on disk. Under the lock nothing new can be reserved, so this is never more than the limit.

    `os.walk` goes on where a reaper deletes a folder meanwhile; `Path.glob` would raise.
    """
    with folder.locked():
        walks = [*os.walk(folder.path / "buckets"), *os.walk(folder.path / "trash")]
        inodes = set()
        for path in (os.path.join(parent, name) for parent, _, names in walks for name in names if name != "record"):
            with suppress(FileNotFoundError):
                inodes.add(os.stat(path).st_ino)
        return len(inodes)


def mix(backend: FileBackend, folder: StoreFolder, *, num_pages: int, seed: int) -> None:
    """Put, read, evict and sometimes flush for a while, longer on a busy machine; count hits and what must never be."""
    rng = random.Random(seed)
    found = dict.fromkeys((*ReadStatus, *WriteStatus, "wrong", "over capacity"), 0)
    began_s = time.monotonic()
    while (took_s := time.monotonic() - began_s) < 60.0:
        if took_s > 1.5 and min(found[ReadStatus.HIT], found[WriteStatus.STORED]) > 20:
            break
        text = rng.randrange(NUM_TEXTS)
        keys, pages = Tenant().keys(backend, PAGES_OF_TEXT, text=text), pages_of(text)
        if rng.random() < 0.02:
            backend.raise_generation(Tenant().scope())
            backend.reap(max_pages=5)
        for status in backend.put(keys, pages):
            found[status] += 1
        buffers = make_buffers(pages)
        for status, buffer, page in zip(backend.get(keys, buffers), buffers, pages, strict=True):
            found[status] += 1
            found["wrong"] += status is ReadStatus.HIT and buffer != page
        found["over capacity"] += count_pages(folder) > num_pages
    print(json.dumps(found), flush=True)


def stop_in_the_middle(backend: FileBackend) -> None:
    """Write half of the third page, then wait to be killed."""
    real_write_all, num_written = file_staging.write_all, 0

    def write_all(fd: int, *buffers: bytes | memoryview) -> None:
        nonlocal num_written
        num_written += 1
        if num_written < 3:
            return real_write_all(fd, *buffers)
        os.write(fd, b"".join(buffers)[: PAGE_BYTES // 2])
        print("in the middle", flush=True)
        time.sleep(60)

    file_staging.write_all = write_all
    backend.put(Tenant().keys(backend, PAGES_OF_TEXT), pages_of(0))


def write_for_ever(backend: FileBackend) -> None:
    text = 0
    print("writing", flush=True)
    while True:
        backend.put(Tenant().keys(backend, PAGES_OF_TEXT, text=text), pages_of(text))
        text += 1


def raise_counters(backend: FileBackend) -> None:
    print(json.dumps([backend.raise_generation(Tenant().scope()) for _ in range(20)]), flush=True)


def main() -> None:
    directory, role, num_pages, seed = sys.argv[1:]
    file_folder.LOCK_TIMEOUT_S = 120.0  # the others have it for as long as a slow disk takes to sync
    backend = FileBackend(directory, capacity_bytes=int(num_pages) * BLOCK_BYTES)
    match role:
        case "mix":
            mix(backend, StoreFolder(Path(directory)), num_pages=int(num_pages), seed=int(seed))
        case "middle":
            stop_in_the_middle(backend)
        case "write":
            write_for_ever(backend)
        case "raise":
            raise_counters(backend)


if __name__ == "__main__":
    main()
