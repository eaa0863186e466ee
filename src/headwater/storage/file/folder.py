"""The folder of a file store: its own subfolder, opened once, and the lock that processes share.

    <directory>/headwater-kv-1/
        STORE           marks the folder as a store
        lock            flock: counters and accounting change under it
        generations     counters, replaced by rename
        usage           pages and bytes, of all processes
        buckets/<id>/   `record`, and one file per page
        staging/        files that are being written
        trash/          unreachable buckets that are being deleted

All paths are relative to open directories, and links are never followed, so no access leaves the folder.
"""

import errno
import fcntl
import os
import secrets
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headwater.storage.errors import StorageTimeout

SUBFOLDER = "headwater-kv-1"
MARKER = "STORE"
_OUR_NAMES = frozenset(
    {MARKER, "lock", "generations", "generations.new", "usage", "buckets", "staging", "trash"}
)
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # opening a pipe in the place of a file must not block
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_A_FOLDER = frozenset({errno.ELOOP, errno.ENOTDIR})
LOCK_TIMEOUT_S = 10.0
LOCK_POLL_S = 0.0005


class StoreVanished(Exception):
    """The folder, or a part of it, was deleted while it was open."""


class StoreFolder:
    """The open directories of one store. The last reference closes them, so that no call in progress loses them."""

    def __init__(self, directory: Path) -> None:
        """Open or make the store in `directory`. ValueError if other files are there or the parent does not exist."""
        self.path = directory / SUBFOLDER
        _make_directory(directory)
        fds: list[int] = []
        self._finalizer = weakref.finalize(self, _close_all, fds)
        self.root_fd = _open_root(self.path)
        fds.append(self.root_fd)
        self._lock_fd = os.open("lock", os.O_RDWR | os.O_CREAT | OPEN_FILE, 0o600, dir_fd=self.root_fd)
        fds.append(self._lock_fd)
        self._thread_lock = threading.Lock()  # flock does not exclude threads of one process
        with self.locked():
            self._mark()
            for name in ("buckets", "staging", "trash"):
                _make_folder(name, dir_fd=self.root_fd)
        self.buckets_fd = os.open("buckets", OPEN_FOLDER, dir_fd=self.root_fd)
        fds.append(self.buckets_fd)
        self.staging_fd = os.open("staging", OPEN_FOLDER, dir_fd=self.root_fd)
        fds.append(self.staging_fd)
        self.trash_fd = os.open("trash", OPEN_FOLDER, dir_fd=self.root_fd)
        fds.append(self.trash_fd)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store's lock against all threads and processes. StorageTimeout if it stays locked."""
        give_up_s = time.monotonic() + LOCK_TIMEOUT_S
        if not self._thread_lock.acquire(timeout=LOCK_TIMEOUT_S):
            raise StorageTimeout(f"the lock of {self.path} was not free for {LOCK_TIMEOUT_S} s")
        try:
            while not try_flock(self._lock_fd):
                if time.monotonic() > give_up_s:
                    raise StorageTimeout(f"the lock of {self.path} was not free for {LOCK_TIMEOUT_S} s")
                time.sleep(LOCK_POLL_S)
            try:
                yield
            finally:
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
        finally:
            self._thread_lock.release()

    def _mark(self) -> None:
        names = set(os.listdir(self.root_fd))
        if MARKER in names:
            return
        if names - _OUR_NAMES:
            raise ValueError(f"storage directory: {self.path} has files in it and is not a store of ours")
        os.close(os.open(MARKER, os.O_WRONLY | os.O_CREAT | OPEN_FILE, 0o600, dir_fd=self.root_fd))


def try_flock(fd: int) -> bool:
    """Take an exclusive lock on an open file if it is free. The lock ends with the process, even after SIGKILL."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_small(name: str, *, dir_fd: int) -> bytes:
    """All bytes of a small file; links are not followed."""
    fd = os.open(name, os.O_RDONLY | OPEN_FILE, dir_fd=dir_fd)
    with open(fd, "rb") as file:
        return file.read()


def write_all(fd: int, *buffers: bytes | memoryview) -> None:
    """Write the buffers one after another; OSError if the medium accepts fewer bytes."""
    views = [memoryview(buffer) for buffer in buffers if len(buffer)]
    while views:
        written = os.writev(fd, views)
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if views:
            views[0] = views[0][written:]


def is_hash_name(name: str) -> bool:
    """Whether a file's name is that of a page or bucket."""
    return len(name) == 32 and all(digit in "0123456789abcdef" for digit in name)


def new_nonce() -> str:
    return secrets.token_hex(8)


def _make_directory(directory: Path) -> None:
    """Make a folder whose parent exists: a wrong path must not leave folders all over a disk."""
    try:
        directory.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise ValueError(f"storage directory: the folder {directory.parent} does not exist") from None
    except FileExistsError:
        raise ValueError(f"storage directory: {directory} must be a folder") from None


def _open_root(path: Path) -> int:
    _make_folder(path)
    try:
        return os.open(path, OPEN_FOLDER)
    except OSError as error:
        if error.errno not in NOT_A_FOLDER:
            raise
        raise ValueError(f"storage directory: {path} must be a folder, not a link or a file") from error


def _make_folder(name: str | Path, *, dir_fd: int | None = None) -> None:
    try:
        os.mkdir(name, mode=stat.S_IRWXU, dir_fd=dir_fd)  # KV is as private as its text
    except FileExistsError:
        return


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
