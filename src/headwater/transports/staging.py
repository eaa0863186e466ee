"""Staging folders in shared memory: files of received tensors, for engines to read."""

import contextlib
import fcntl
import itertools
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from headwater.devices.gpu_note import note_path
from headwater.devices.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, StoredTensor, parse_header

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "headwater-weights-"
_LOCK = "lock"
_LARGEST_PART = 0.75  # of the free bytes, if no limit is set
_WRITE_BYTES = 16 << 20  # at once
_LARGE_BYTES = 64 << 20  # which take 5 ms to delete


class BucketError(ValueError):
    """A bucket of tensors that cannot be used, in words for its sender."""


class StagingFull(BucketError):
    """The bucket does not fit into the staging area."""


class StagingArea:
    """A private folder for the weights that this server receives. It ends with the process that made it.

    `max_bytes` bounds everything in it: what arrives, and what is kept for restarts and resumed memory.
    """

    def __init__(self, parent: Path = SHARED_MEMORY, *, max_bytes: int | None = None) -> None:
        self._parent = parent
        self._max_bytes = max_bytes
        self._root: Path | None = None
        self._lock: int | None = None
        self._folders: dict[str, StagedFolder] = {}
        self._numbers = itertools.count(1)

    def folder(self) -> "StagedFolder":
        """A new empty folder. OSError if the system gives none."""
        if self._root is None:
            self._root, self._lock = _private_root(self._parent)
        path = self._root / str(next(self._numbers))
        path.mkdir(mode=0o700)
        folder = self._folders[str(path)] = StagedFolder(path, self)
        return folder

    @property
    def num_bytes(self) -> int:
        return sum(folder.num_bytes for folder in self._folders.values())

    def check_room(self, num_bytes: int) -> None:
        """Raise StagingFull if so many more bytes do not fit."""
        limit = self._limit()
        if self.num_bytes + num_bytes > limit:
            raise StagingFull(
                f"{num_bytes} more bytes do not fit beside {self.num_bytes} received bytes: at most {limit} bytes are "
                f"staged in {self._parent} (--max-staged-weights-bytes)"
            )

    def keep_only(self, paths: Collection[str]) -> None:
        """Delete every folder but `paths` and those that still receive."""
        for path, folder in list(self._folders.items()):
            if folder.is_complete and path not in paths:
                folder.delete()

    def forget(self, folder: "StagedFolder") -> None:
        self._folders.pop(str(folder.path), None)

    def close(self) -> None:
        """Delete everything."""
        for folder in list(self._folders.values()):
            folder.delete()
        if self._root is not None and self._lock is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            os.close(self._lock)
            self._root = self._lock = None

    def _limit(self) -> int:
        if self._max_bytes is not None:
            return self._max_bytes
        free = shutil.disk_usage(self._parent).free
        return self.num_bytes + int(free * _LARGEST_PART)


class StagedFolder:
    """The buckets of one transfer, numbered in the order in which they were completed."""

    def __init__(self, path: Path, area: StagingArea) -> None:
        self.path = path
        self.is_complete = False  # nothing more is written to it
        self.num_bytes = 0
        self._area = area
        self._numbers = itertools.count(1)

    def bucket(self) -> "BucketFile":
        return BucketFile(self, self._area)

    def next_path(self) -> Path:
        return self.path / f"{next(self._numbers):06}.safetensors"

    def delete(self) -> None:
        """Delete the folder: a large one in a thread, since the memory of 16 GB takes a second to free."""
        self.is_complete = True
        self._area.forget(self)
        if self.num_bytes < _LARGE_BYTES:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            delete = partial(shutil.rmtree, self.path, ignore_errors=True)
            threading.Thread(target=delete, name="delete-staged", daemon=True).start()


@dataclass(slots=True)
class Received:
    """A whole bucket on its way into a transfer."""

    tensors: dict[str, StoredTensor]
    num_bytes: int


class BucketFile:
    """One bucket that arrives in pieces. Only `finish` makes it a part of its folder."""

    def __init__(self, folder: StagedFolder, area: StagingArea) -> None:
        self._folder = folder
        self._area = area
        self._path = folder.path / f"{secrets.token_hex(8)}.part"
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._num_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`. StagingFull if it does not fit."""
        self._area.check_room(len(data))
        view = memoryview(data)
        at = 0
        while at < len(view):
            try:
                at += os.write(self._fd, view[at : at + _WRITE_BYTES])
            except OSError as error:
                raise StagingFull(f"the bucket cannot be written: {error.strerror}") from None
        self._num_bytes += len(view)
        self._folder.num_bytes += len(view)

    def take(self, path: Path) -> None:
        """Make a regular file the bucket, by its name alone. BucketError if that is not possible."""
        try:
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise BucketError(f"{path} is no regular file with one name")
            self._area.check_room(found.st_size)
            path.rename(self._path)
        except OSError as error:
            raise BucketError(f"{path} cannot be moved into the staging area: {error.strerror}") from None
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self.written_elsewhere()

    def copy_from(self, path: Path) -> None:
        """Append a regular file, in the kernel. BucketError if it cannot be read."""
        try:
            source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise BucketError(f"{path} cannot be opened: {error.strerror}") from None
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode):
                raise BucketError(f"{path} is no regular file")
            self._area.check_room(found.st_size)
            left = found.st_size
            while left:
                count = os.sendfile(self._fd, source, None, min(left, _WRITE_BYTES))
                if count == 0:
                    raise BucketError(f"{path} became shorter while it was read")
                left -= count
            self._num_bytes += found.st_size
            self._folder.num_bytes += found.st_size
        except OSError as error:
            raise StagingFull(f"the bucket cannot be written: {error.strerror}") from None
        finally:
            os.close(source)

    @property
    def path(self) -> Path:
        return self._path

    def check_room(self, num_bytes: int) -> None:
        """Raise StagingFull if a bucket of so many bytes does not fit."""
        self._area.check_room(num_bytes)

    def written_elsewhere(self) -> None:
        """Another process has written the whole bucket to `path`."""
        self._num_bytes = os.fstat(self._fd).st_size
        self._folder.num_bytes += self._num_bytes

    def finish(self, name: str | None = None) -> Received:
        """The tensors of the whole bucket, which are now part of the folder. BucketError if it is torn.

        `name`: of its file, where it is not one of many.
        """
        try:
            tensors = self._header()
            if self._folder.is_complete:
                raise BucketError("the transfer ended while the bucket arrived")
            to = self._folder.next_path() if name is None else self._folder.path / name
            if note_path(self._path).exists():  # first: without its note, the file would count as whole
                note_path(self._path).rename(note_path(to))
            self._path.rename(to)
        except BucketError:
            self.discard()
            raise
        os.close(self._fd)
        self._fd = -1
        return Received(tensors, self._num_bytes)

    def discard(self) -> None:
        """Give the bucket up."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        note_path(self._path).unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
        self._folder.num_bytes -= self._num_bytes

    def _header(self) -> dict[str, StoredTensor]:
        length = int.from_bytes(os.pread(self._fd, LENGTH_BYTES, 0), "little")
        if self._num_bytes < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, self._num_bytes - LENGTH_BYTES):
            raise BucketError(f"{self._num_bytes} bytes arrived, which are no whole safetensors file")
        try:
            return parse_header(os.pread(self._fd, length, LENGTH_BYTES), size=self._num_bytes)
        except ValueError as error:
            raise BucketError(f"the bucket is no whole safetensors file: {error}") from None


def _private_root(parent: Path) -> tuple[Path, int]:
    """A new folder for this process, and the lock that shows that the process lives."""
    _remove_left_over(parent)
    name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    new = parent / f".{name}"  # under its name only when it is locked: another server may be deleting what is not
    new.mkdir(mode=0o700)
    lock = os.open(new / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return new.rename(parent / name), lock


def _remove_left_over(parent: Path) -> None:
    """Delete the folders of this user's processes that were killed: their locks are free."""
    for root in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's folder, one in use, or one that is being deleted
            lock = os.open(root / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(root, ignore_errors=True)
            finally:
                os.close(lock)
