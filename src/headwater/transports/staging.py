"""Staging folders in shared memory: files of received tensors, for engines to read."""

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
from headwater.transports.private_root import private_root
from headwater.transports.spare_files import SpareFiles

SHARED_MEMORY = Path("/dev/shm")
_SPARE = "spare"
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
        self._spare: SpareFiles | None = None
        self._numbers = itertools.count(1)

    def folder(self) -> "StagedFolder":
        """A new empty folder. OSError if the system gives none."""
        if self._root is None:
            self._root, self._lock = private_root(self._parent)
            self._spare = SpareFiles(self._root / _SPARE)
        path = self._root / str(next(self._numbers))
        path.mkdir(mode=0o700)
        folder = self._folders[str(path)] = StagedFolder(path, self)
        return folder

    @property
    def num_bytes(self) -> int:
        return sum(folder.num_bytes for folder in self._folders.values())

    @property
    def spare_bytes(self) -> int:
        """Bytes of files that the next update writes over."""
        return self._spare.num_bytes if self._spare is not None else 0

    def check_room(self, num_bytes: int) -> None:
        """Raise StagingFull if so many more bytes do not fit. They come before spare files."""
        if self.num_bytes + self.spare_bytes + num_bytes > self._limit():
            self.free_spare()
        limit = self._limit()
        if self.num_bytes + num_bytes > limit:
            raise StagingFull(
                f"{num_bytes} more bytes do not fit beside {self.num_bytes} received bytes: at most {limit} bytes are "
                f"staged in {self._parent} (--max-staged-weights-bytes)"
            )

    def keep_only(self, paths: Collection[str]) -> None:
        """Delete every folder but `paths` and those that still receive. The memory of large files stays for a while."""
        for path, folder in list(self._folders.items()):
            if folder.is_complete and path not in paths:
                folder.delete(keeps_memory=True)

    def keep_memory_of(self, folder: "StagedFolder") -> None:
        """Keep whole files that no process reads, up to the size of what is staged."""
        for file in sorted(folder.path.glob("*.safetensors")):
            if self._spare is not None:
                self._spare.offer(file, most_bytes=self.num_bytes)

    def take_spare(self, num_bytes: int, to: Path) -> int:
        """Move a spare file for a bucket to `to`: its size, 0 if there is none."""
        return self._spare.take(num_bytes, to) if self._spare is not None else 0

    def free_spare(self) -> None:
        """Give the memory of spare files back to the system."""
        if self._spare is not None:
            self._spare.clear()

    def forget(self, folder: "StagedFolder") -> None:
        self._folders.pop(str(folder.path), None)

    def close(self) -> None:
        """Delete everything."""
        for folder in list(self._folders.values()):
            folder.delete()
        if self._root is not None and self._lock is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            os.close(self._lock)
            self._root = self._lock = self._spare = None

    def _limit(self) -> int:
        if self._max_bytes is not None:
            return self._max_bytes
        free = shutil.disk_usage(self._parent).free
        return self.num_bytes + self.spare_bytes + int(free * _LARGEST_PART)


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

    def delete(self, *, keeps_memory: bool = False) -> None:
        """Delete the folder: a large one in a thread, since the memory of 16 GB takes a second to free.

        `keeps_memory`: the next buckets may write over its files.
        """
        self.is_complete = True
        self._area.forget(self)
        if keeps_memory:
            self._area.keep_memory_of(self)
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
        self._num_bytes = 0  # of the bucket so far
        self._counted = 0  # bytes of the folder: those, or more while the file is a spare one

    def reserve(self, num_bytes: int) -> None:
        """Before anything is written: about so many bytes will come. StagingFull if they do not fit.

        A spare file becomes the bucket's, so that its pages need not be made.
        """
        size = self._area.take_spare(num_bytes, self._path)
        if size:
            os.close(self._fd)
            self._fd = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._count(size)
        self._area.check_room(max(0, num_bytes - self._counted))

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`. StagingFull if it does not fit."""
        view = memoryview(data)
        self._area.check_room(max(0, self._num_bytes + len(view) - self._counted))
        at = 0
        while at < len(view):
            try:
                at += os.pwrite(self._fd, view[at : at + _WRITE_BYTES], self._num_bytes + at)
            except OSError as error:
                raise StagingFull(f"the bucket cannot be written: {error.strerror}") from None
        self._num_bytes += len(view)
        self._count(self._num_bytes)

    def splice_from(self, pipe: int, num_bytes: int) -> None:
        """Append bytes that a pipe holds, in the kernel. StagingFull if they do not fit."""
        self._area.check_room(max(0, self._num_bytes + num_bytes - self._counted))
        left = num_bytes
        while left:
            try:
                count = os.splice(pipe, self._fd, left, offset_dst=self._num_bytes)
            except OSError as error:
                raise StagingFull(f"the bucket cannot be written: {error.strerror}") from None
            left -= count
            self._num_bytes += count
        self._count(self._num_bytes)

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
        """Make the bucket a copy of a regular file, in the kernel. BucketError if it cannot be read."""
        try:
            source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise BucketError(f"{path} cannot be opened: {error.strerror}") from None
        try:
            found = os.fstat(source)
            if not stat.S_ISREG(found.st_mode):
                raise BucketError(f"{path} is no regular file")
            self.reserve(found.st_size)
            left = found.st_size
            while left:
                count = os.sendfile(self._fd, source, None, min(left, _WRITE_BYTES))
                if count == 0:
                    raise BucketError(f"{path} became shorter while it was read")
                left -= count
            self._num_bytes = found.st_size
            self._count(found.st_size)
        except OSError as error:
            raise StagingFull(f"the bucket cannot be written: {error.strerror}") from None
        finally:
            os.close(source)

    @property
    def path(self) -> Path:
        return self._path

    def written_elsewhere(self) -> None:
        """Another process has written the whole bucket to `path`."""
        self._num_bytes = os.fstat(self._fd).st_size
        self._count(self._num_bytes)

    def finish(self, name: str | None = None) -> Received:
        """The tensors of the whole bucket, which are now part of the folder. BucketError if it is torn.

        `name`: of its file, where it is not one of many.
        """
        try:
            tensors = self._header()
            if self._folder.is_complete:
                raise BucketError("the transfer ended while the bucket arrived")
            if self._num_bytes < self._counted:  # a spare file was larger
                os.ftruncate(self._fd, self._num_bytes)
                self._folder.num_bytes -= self._counted - self._num_bytes
                self._counted = self._num_bytes
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
        self._folder.num_bytes -= self._counted

    def _count(self, num_bytes: int) -> None:
        """The file has this size now."""
        self._folder.num_bytes += max(0, num_bytes - self._counted)
        self._counted = max(num_bytes, self._counted)

    def _header(self) -> dict[str, StoredTensor]:
        length = int.from_bytes(os.pread(self._fd, LENGTH_BYTES, 0), "little")
        if self._num_bytes < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, self._num_bytes - LENGTH_BYTES):
            raise BucketError(f"{self._num_bytes} bytes arrived, which are no whole safetensors file")
        try:
            return parse_header(os.pread(self._fd, length, LENGTH_BYTES), size=self._num_bytes)
        except ValueError as error:
            raise BucketError(f"the bucket is no whole safetensors file: {error}") from None
