"""Staging of a file store: files are written here and then published, so readers see whole pages only.

Each process stages under its own random name and holds a lock on a file of that name. The lock ends with the
process in any case; a process that finds it free deletes the files that were left.
"""

import itertools
import os
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from headwater.storage.file.folder import (
    OPEN_FILE,
    StoreFolder,
    StoreVanished,
    new_nonce,
    try_flock,
    write_all,
)
from headwater.storage.file.usage import Usage

_SUFFIX = ".staged"
_ORPHAN_AGE_S = 3600.0  # of staged files without a lock file; younger ones may belong to a process that is starting


class StagedFile:
    """One file that this process is writing. See `Staging.new_file`."""

    def __init__(self, name: str, *, dir_fd: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FILE
        self._name = name
        self._dir_fd = dir_fd
        self._fd: int | None = os.open(name, flags, 0o600, dir_fd=dir_fd)
        self._is_published = False

    def write(self, *buffers: bytes | memoryview, mtime_ns: int) -> None:
        """Fill and close the file.

        The file is not synced: after a power failure a page may be torn, and then its checksum makes it a miss. A sync
        per page would cost more than the page is worth.
        """
        assert self._fd is not None
        write_all(self._fd, *buffers)
        os.utime(self._fd, ns=(mtime_ns, mtime_ns))
        self._close()  # may be the call that reports a full disk

    def publish(self, target: str, *, dir_fd: int) -> None:
        """Move the file to its place in one step."""
        os.rename(self._name, target, src_dir_fd=self._dir_fd, dst_dir_fd=dir_fd)
        self._is_published = True

    def end(self) -> None:
        """Delete the file if it was not published."""
        self._close()
        if not self._is_published:
            _discard(self._name, dir_fd=self._dir_fd)

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


class Staging:
    """The staged files of this process, and those left by dead processes."""

    def __init__(self, folder: StoreFolder) -> None:
        self._dir_fd = folder.staging_fd
        self._serial = itertools.count()
        self._owner, lock_fd = self._register()
        self._finalizer = weakref.finalize(self, os.close, lock_fd)

    @contextmanager
    def new_file(self, *, num_bytes: int) -> Iterator[StagedFile]:
        """A new file for a page of `num_bytes`, which is deleted at the end unless it was published."""
        try:
            staged = StagedFile(self._new_name(num_bytes), dir_fd=self._dir_fd)
        except FileNotFoundError:
            raise StoreVanished from None
        try:
            yield staged
        finally:
            staged.end()

    def usage(self) -> Usage:
        """The pages that all processes are writing, at their final size."""
        names = [name for name in os.listdir(self._dir_fd) if name.endswith(_SUFFIX)]
        sizes = [int(size) for name in names if (size := name.removesuffix(_SUFFIX).rpartition("-")[2]).isdigit()]
        return Usage(sum(size > 0 for size in sizes), sum(sizes))

    def make_folder(self) -> str:
        """Stage an empty folder; return its name."""
        name = self._new_name(0)
        try:
            os.mkdir(name, mode=0o700, dir_fd=self._dir_fd)
        except FileNotFoundError:
            raise StoreVanished from None
        return name

    def publish_folder(self, name: str, *, target: str, dir_fd: int) -> None:
        """Move a staged folder to its place in one step."""
        os.rename(name, target, src_dir_fd=self._dir_fd, dst_dir_fd=dir_fd)

    def discard_folder(self, name: str) -> None:
        _discard(name, dir_fd=self._dir_fd)

    def sweep(self) -> int:
        """Delete the files and folders of dead processes; return their number."""
        names = os.listdir(self._dir_fd)
        owners = {name.removesuffix(".lock") for name in names if name.endswith(".lock")}
        staged = [name for name in names if name.endswith(_SUFFIX)]
        num_deleted = 0
        for owner in owners - {self._owner}:
            num_deleted += self._sweep_owner(owner, [n for n in staged if n.startswith(owner + "-")])
        for name in staged:
            if name.split("-")[0] not in owners and self._age_s(name) > _ORPHAN_AGE_S:
                _discard(name, dir_fd=self._dir_fd)
                num_deleted += 1
        return num_deleted

    def _sweep_owner(self, owner: str, staged: list[str]) -> int:
        try:
            lock_fd = os.open(f"{owner}.lock", os.O_RDWR | OPEN_FILE, dir_fd=self._dir_fd)
        except FileNotFoundError:
            return 0
        try:
            if not try_flock(lock_fd):
                return 0  # alive
            for name in staged:
                _discard(name, dir_fd=self._dir_fd)
            _discard(f"{owner}.lock", dir_fd=self._dir_fd)
            return len(staged)
        finally:
            os.close(lock_fd)

    def _register(self) -> tuple[str, int]:
        while True:
            owner = new_nonce()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | OPEN_FILE
            fd = os.open(f"{owner}.lock", flags, 0o600, dir_fd=self._dir_fd)
            # another process may have deleted the file between these two calls
            if try_flock(fd) and os.fstat(fd).st_nlink == 1:
                return owner, fd
            os.close(fd)

    def _new_name(self, num_bytes: int) -> str:
        return f"{self._owner}-{next(self._serial)}-{num_bytes}{_SUFFIX}"

    def _age_s(self, name: str) -> float:
        try:
            info = os.stat(name, dir_fd=self._dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return 0.0
        return time.time() - info.st_ctime  # not mtime, which keeps the page's position in the LRU order


def _discard(name: str, *, dir_fd: int) -> None:
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(name, dir_fd=dir_fd, ignore_errors=True)
