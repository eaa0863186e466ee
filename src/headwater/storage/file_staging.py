"""Where a file store writes before it publishes: a reader sees a page whole or not at all.

Each process stages under its own random name and holds a lock on a file of that name. The lock ends with the
process, however it ends; whoever finds it free deletes what was left.
"""

import itertools
import os
import shutil
import time
import weakref

from headwater.storage.file_folder import OPEN_FILE, StoreFolder, new_nonce, try_flock, write_all

_ORPHAN_AGE_S = 3600.0  # staged files whose lock file is gone; younger ones may be of a process just starting


class Staging:
    """The staged files of this process, and those that dead processes left behind."""

    def __init__(self, folder: StoreFolder) -> None:
        self._dir_fd = folder.staging_fd
        self._serial = itertools.count()
        self._owner, lock_fd = self._register()
        self._finalizer = weakref.finalize(self, os.close, lock_fd)

    def write(self, *buffers: bytes | memoryview, mtime_ns: int) -> str:
        """Stage a file; its name, for `publish` or `discard`. On errors nothing is left.

        Not synced: after a power cut a page may be torn, then its checksum makes it a miss. A sync per page
        would cost more than the page is worth.
        """
        name = self._new_name()
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FILE, 0o600, dir_fd=self._dir_fd)
        try:
            try:
                write_all(fd, *buffers)
                os.utime(fd, ns=(mtime_ns, mtime_ns))
            finally:
                os.close(fd)  # may be the call that tells of a full disk
        except BaseException:
            self.discard(name)
            raise
        return name

    def publish(self, name: str, *, target: str, dir_fd: int) -> None:
        """Move a staged file or folder to its place, in one step."""
        os.rename(name, target, src_dir_fd=self._dir_fd, dst_dir_fd=dir_fd)

    def make_folder(self) -> str:
        """Stage an empty folder; its name."""
        name = self._new_name()
        os.mkdir(name, mode=0o700, dir_fd=self._dir_fd)
        return name

    def discard(self, name: str) -> None:
        """Delete a staged file or folder, if it is still there."""
        try:
            os.unlink(name, dir_fd=self._dir_fd)
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):
            shutil.rmtree(name, dir_fd=self._dir_fd, ignore_errors=True)

    def sweep(self) -> int:
        """Delete what dead processes left; the number of files and folders."""
        names = os.listdir(self._dir_fd)
        owners = {name.removesuffix(".lock") for name in names if name.endswith(".lock")}
        staged = [name for name in names if name.endswith(".staged")]
        num_deleted = 0
        for owner in owners - {self._owner}:
            num_deleted += self._sweep_owner(owner, [n for n in staged if n.startswith(owner + "-")])
        for name in staged:
            if name.split("-")[0] not in owners and self._age_s(name) > _ORPHAN_AGE_S:
                self.discard(name)
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
                self.discard(name)
            self.discard(f"{owner}.lock")
            return len(staged)
        finally:
            os.close(lock_fd)

    def _register(self) -> tuple[str, int]:
        while True:
            owner = new_nonce()
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | OPEN_FILE
            fd = os.open(f"{owner}.lock", flags, 0o600, dir_fd=self._dir_fd)
            # a sweeper may have found the file between these two calls and deleted it
            if try_flock(fd) and os.fstat(fd).st_nlink == 1:
                return owner, fd
            os.close(fd)

    def _new_name(self) -> str:
        return f"{self._owner}-{next(self._serial)}.staged"

    def _age_s(self, name: str) -> float:
        try:
            info = os.stat(name, dir_fd=self._dir_fd, follow_symlinks=False)
        except FileNotFoundError:
            return 0.0
        return time.time() - info.st_ctime  # not mtime: that carries the page's place in the LRU order
