"""Generations of a file store: one small file, replaced as a whole under the store's lock.

Readers compare the file's inode with every batch, which costs one stat. They keep the file open, so its inode cannot
be reused, and they notice every replacement, even of two in quick succession.
"""

import os
import secrets
import threading
import weakref
from collections.abc import Sequence

import msgspec
import xxhash

from headwater.storage.file.folder import OPEN_FILE, StoreFolder, StoreVanished, write_all

_NAME = "generations"
_NEW_NAME = "generations.new"  # one name is enough, since it is written under the lock
_CHECKSUM_BYTES = 16


class _Counters(msgspec.Struct, array_like=True, frozen=True):
    start: int  # random, made with the file: if the file is lost, its successor repeats no old number
    raised: dict[bytes, int]  # scope id -> number of times it was raised, if any


_decode = msgspec.msgpack.Decoder(_Counters).decode


class FileGenerations:
    """The generation counters of one open store."""

    def __init__(self, folder: StoreFolder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._counters = _Counters(0, {})
        self._inode: tuple[int, int] | None = None  # device and inode of the file read last
        self._close_held = weakref.finalize(self, _nothing_held)
        with folder.locked():
            try:
                self._refresh()
            except StoreVanished:
                self._publish(_Counters(secrets.randbits(62), {}))

    def current(self, scope_ids: Sequence[bytes]) -> tuple[int, ...]:
        """The present counters of these scopes. StoreVanished if the file was deleted."""
        with self._lock:
            self._refresh()
            start, raised = self._counters.start, self._counters.raised
        return tuple(start + raised.get(scope_id, 0) for scope_id in scope_ids)

    def raise_one(self, scope_id: bytes) -> int:
        """Raise one counter, which is on disk when this returns."""
        with self._folder.locked(), self._lock:
            self._refresh()
            start, raised = self._counters.start, dict(self._counters.raised)
            raised[scope_id] = raised.get(scope_id, 0) + 1
            self._publish(_Counters(start, raised))
            return start + raised[scope_id]

    def _refresh(self) -> None:
        root_fd = self._folder.root_fd
        try:
            found = os.stat(_NAME, dir_fd=root_fd, follow_symlinks=False)
            if (found.st_dev, found.st_ino) == self._inode:
                return
            fd = os.open(_NAME, os.O_RDONLY | OPEN_FILE, dir_fd=root_fd)
        except FileNotFoundError:
            raise StoreVanished from None
        try:
            content = os.pread(fd, os.fstat(fd).st_size, 0)
            if xxhash.xxh3_128_digest(content[_CHECKSUM_BYTES:]) != content[:_CHECKSUM_BYTES]:
                raise StoreVanished
            self._counters = _decode(content[_CHECKSUM_BYTES:])
        except BaseException:
            os.close(fd)
            raise
        self._hold(fd)

    def _publish(self, counters: _Counters) -> None:
        encoded = msgspec.msgpack.encode(counters)
        root_fd = self._folder.root_fd
        fd = os.open(_NEW_NAME, os.O_RDWR | os.O_CREAT | os.O_TRUNC | OPEN_FILE, 0o600, dir_fd=root_fd)
        try:
            write_all(fd, xxhash.xxh3_128_digest(encoded), encoded)
            os.fsync(fd)
            os.rename(_NEW_NAME, _NAME, src_dir_fd=root_fd, dst_dir_fd=root_fd)
            os.fsync(root_fd)  # the rename as well: else a power failure could restore the old counters
        except BaseException:
            os.close(fd)
            raise
        self._counters = counters
        self._hold(fd)

    def _hold(self, fd: int) -> None:
        info = os.fstat(fd)
        self._inode = (info.st_dev, info.st_ino)
        self._close_held()
        self._close_held = weakref.finalize(self, os.close, fd)


def _nothing_held() -> None:
    """Close nothing: the finaliser before the first file is held."""
