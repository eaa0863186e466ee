"""The speed of the storage tier's backends, compared with the plain operations below them, in one run.

    python benchmarks/storage.py [--num-pages 200] [--page-bytes 368640] [--directory DIR] [--save]

Every figure is the median of alternating rounds. "Cold" reads come from the medium, after the files were dropped from
the page cache. Redis is measured if a server is on the PATH; it shares this machine's cores.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import redis

from headwater.storage.backend import ReadStatus, StorageBackend, WriteStatus
from headwater.storage.file import store as file_store
from headwater.storage.file.backend import FileBackend
from headwater.storage.page_key import Bucket, PageKey, chain_hashes, page_keys, scope_ids
from headwater.storage.redis.backend import RedisBackend

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from results import save, without_paths

NAMESPACE, DOMAIN = b"benchmark".ljust(16), b"domain".ljust(16)
NUM_HASHED_TOKENS = 100_000
PAGE_SIZE = 16


class Workload:
    """Pages to store, buffers to read them into, and their keys in a backend."""

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, (num_pages, page_bytes), dtype=np.uint8)
        self.into = np.empty_like(self.data)
        self.pages = [memoryview(row) for row in self.data]
        self.buffers = [memoryview(row) for row in self.into]
        self.into[:] = 0  # the first write causes page faults

    def keys(self, backend: StorageBackend) -> list[PageKey]:
        scopes = scope_ids(DOMAIN, cache_salt="", extra_key="")
        bucket = Bucket.of(NAMESPACE, scope_ids=scopes, generations=backend.generations(scopes))
        tokens = np.arange(len(self.pages) * PAGE_SIZE, dtype=np.int32)
        return page_keys(bucket, chain_hashes(NAMESPACE, tokens, PAGE_SIZE))


class Rounds:
    """Times named operations round by round, so that a slow moment of the machine affects all of them."""

    def __init__(self) -> None:
        self.operations: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}
        self.times_s: dict[str, list[float]] = {}

    def add(self, name: str, operation: Callable[[], object], before: Callable[[], object] = int) -> None:
        """Add an operation. `before` runs before each round, untimed."""
        self.operations[name] = (operation, before)
        self.times_s[name] = []

    def run(self, num_rounds: int) -> None:
        for _ in range(num_rounds):
            for name, (operation, before) in self.operations.items():
                before()
                began_s = time.perf_counter()
                operation()
                self.times_s[name].append(time.perf_counter() - began_s)

    def median_s(self, name: str) -> float:
        return statistics.median(self.times_s[name])


def add_plain_files(rounds: Rounds, work: Workload, directory: Path) -> None:
    paths = [directory / f"plain-{index}" for index in range(len(work.pages))]

    def write() -> None:
        for path, page in zip(paths, work.pages, strict=True):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.write(fd, page)
            os.close(fd)

    def read() -> None:
        for path, buffer in zip(paths, work.buffers, strict=True):
            fd = os.open(path, os.O_RDONLY)
            os.readv(fd, [buffer])
            os.close(fd)

    rounds.add("plain file write", write, lambda: [path.unlink(missing_ok=True) for path in paths])
    rounds.add("plain file read", read)
    rounds.add("plain file read, cold", read, lambda: forget(paths))


def add_file_backend(rounds: Rounds, work: Workload, directory: Path) -> StorageBackend:
    backend = FileBackend(directory / "store", capacity_bytes=4 * work.data.nbytes)
    keys = work.keys(backend)

    def paths() -> list[Path]:
        return [path for path in (directory / "store").rglob("*") if len(path.name) == 32 and path.is_file()]

    rounds.add("file put", lambda: check_put(backend, keys, work), lambda: backend.delete(keys))
    rounds.add("file put, present", lambda: backend.put(keys, work.pages))
    rounds.add("file exists", lambda: backend.exists(keys))
    rounds.add("file get", lambda: check_get(backend, keys, work))
    rounds.add("file get, no checksum", lambda: without_checksum(lambda: backend.get(keys, work.buffers)))
    rounds.add("file get, cold", lambda: check_get(backend, keys, work), lambda: forget(paths()))
    return backend


def add_redis(rounds: Rounds, work: Workload, url: str) -> StorageBackend:
    backend = RedisBackend(url)
    keys = work.keys(backend)
    client = redis.Redis.from_url(url)
    names = [b"plain:%d" % index for index in range(len(work.pages))]

    def plain_set() -> None:
        for name, page in zip(names, work.pages, strict=True):
            client.set(name, page)

    def plain_get() -> None:
        for name, buffer in zip(names, work.buffers, strict=True):
            buffer[:] = client.get(name)

    rounds.add("plain redis set", plain_set, lambda: client.delete(*names))
    rounds.add("plain redis get", plain_get)
    rounds.add("redis put", lambda: check_put(backend, keys, work), lambda: backend.delete(keys))
    rounds.add("redis get", lambda: check_get(backend, keys, work))
    return backend


def check_put(backend: StorageBackend, keys: list[PageKey], work: Workload) -> None:
    assert set(backend.put(keys, work.pages)) == {WriteStatus.STORED}


def check_get(backend: StorageBackend, keys: list[PageKey], work: Workload) -> None:
    assert set(backend.get(keys, work.buffers)) == {ReadStatus.HIT}


def without_checksum(operation: Callable[[], object]) -> None:
    real = file_store.find_defect
    file_store.find_defect = lambda *_: None
    try:
        operation()
    finally:
        file_store.find_defect = real


def forget(paths: list[Path]) -> None:
    """Write files back and drop them from the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def start_redis(directory: Path) -> tuple[subprocess.Popen, str] | None:
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        return None
    socket = directory / "s"
    command = [binary, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    give_up_s = time.monotonic() + 10
    while not socket.exists() and time.monotonic() < give_up_s:
        time.sleep(0.02)
    return process, f"unix://{socket}"


def report(rounds: Rounds, work: Workload) -> dict[str, float]:
    """The MB/s of operations that move pages, and the small costs."""
    num_pages, figures = len(work.pages), {}
    for name in rounds.operations:
        took_s = rounds.median_s(name)
        if name.startswith("chain hash"):
            figures[f"{name}, ns per token"] = 1e9 * took_s / NUM_HASHED_TOKENS
        elif name in ("generations", "file exists", "file put, present"):
            figures[f"{name}, us each"] = 1e6 * took_s / num_pages
        else:
            figures[f"{name}, MB/s"] = work.data.nbytes / took_s / 1e6
    checksum_s = rounds.median_s("file get") - rounds.median_s("file get, no checksum")
    figures["checksum, share of a get from the page cache, %"] = 100 * checksum_s / rounds.median_s("file get")
    figures["checksum, share of a cold get, %"] = 100 * checksum_s / rounds.median_s("file get, cold")
    for ours, plain in (
        ("file put", "plain file write"),
        ("file get", "plain file read"),
        ("file get, cold", "plain file read, cold"),
        ("redis put", "plain redis set"),
        ("redis get", "plain redis get"),
    ):
        if ours in rounds.operations:
            figures[f"{ours} / {plain}"] = rounds.median_s(plain) / rounds.median_s(ours)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-pages", type=int, default=200)
    parser.add_argument("--page-bytes", type=int, default=368_640, help="SmolLM2-135M: 16 tokens in bfloat16")
    parser.add_argument("--num-rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=None, help="on the medium to measure")
    parser.add_argument("--save", action="store_true", help="keep the figures under results/")
    args = parser.parse_args()

    work, rounds = Workload(args.num_pages, args.page_bytes), Rounds()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        directory = Path(name)
        rounds.add("memcpy", lambda: np.copyto(work.into, work.data))
        add_plain_files(rounds, work, directory)
        backend = add_file_backend(rounds, work, directory)
        scopes = scope_ids(DOMAIN, cache_salt="", extra_key="")
        rounds.add("generations", lambda: [backend.generations(scopes) for _ in work.pages])
        tokens = np.arange(NUM_HASHED_TOKENS, dtype=np.int32)
        rounds.add("chain hash", lambda: chain_hashes(NAMESPACE, tokens, PAGE_SIZE))
        server = start_redis(directory)
        try:
            if server is not None:
                add_redis(rounds, work, server[1])
            rounds.run(args.num_rounds)
        finally:
            if server is not None:
                server[0].terminate()
                server[0].wait()
    figures = report(rounds, work)
    for label, value in figures.items():
        print(f"{label:<55}{value:>12,.2f}")
    if args.save:
        records = [{"operation": name, "times_s": times} for name, times in rounds.times_s.items()]
        about = {"command": without_paths(sys.argv), "figures": figures}
        print(f"saved as {save('storage', records, servers={'storage': about}).name}")


if __name__ == "__main__":
    main()
