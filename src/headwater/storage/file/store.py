"""One open file store: finds, reads, writes and deletes pages in its folder."""

import os
import stat
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from headwater.storage.backend import ReadStatus, StorageUsage, WriteStatus, is_outdated
from headwater.storage.counters import StorageCounters
from headwater.storage.file.buckets import BucketFolders
from headwater.storage.file.eviction import Evictor, is_recent, recency_ns
from headwater.storage.file.folder import NO_ROOM, NOT_A_FOLDER, OPEN_FILE, StoreFolder
from headwater.storage.file.generations import FileGenerations
from headwater.storage.file.staging import Staging
from headwater.storage.file.trash import Trash
from headwater.storage.file.usage import Usage, UsageLedger, allocated_bytes
from headwater.storage.page_format import HEADER_BYTES, Defect, find_defect, header_of
from headwater.storage.page_key import Bucket, PageKey

RECOUNT_INTERVAL_S = 3600.0  # corrects the ledger after killed processes and manual deletions
_RESERVE_ATTEMPTS = 4  # other processes may take the room that was just made


class FileStore:
    """An open store. Raises StoreVanished if the folder was deleted: the caller then opens a new one."""

    def __init__(self, directory: Path, *, capacity_bytes: int, counters: StorageCounters) -> None:
        self._capacity_bytes = capacity_bytes
        self._counters = counters
        folder = StoreFolder(directory)
        self.generations = FileGenerations(folder)
        self._staging = Staging(folder)
        self._buckets = BucketFolders(folder, self._staging)
        self._ledger = UsageLedger(folder)
        self._evictor = Evictor(
            folder, self._buckets, staging=self._staging, ledger=self._ledger, counters=counters
        )
        self._trash = Trash(folder, self._buckets, ledger=self._ledger)
        self._counted_s = float("-inf")
        if self._ledger.is_new:
            self._recount()

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        found = [False] * len(keys)
        for bucket, indices in _by_bucket(keys):
            if self._is_stale(bucket):
                continue
            with self._buckets.opened(bucket.id) as fd:
                for index in indices:
                    found[index] = fd is not None and _page_mtime_ns(keys[index], dir_fd=fd) is not None
        return found

    def read(self, keys: Sequence[PageKey], into: Sequence[memoryview]) -> list[ReadStatus]:
        statuses = [ReadStatus.MISS] * len(keys)
        for bucket, indices in _by_bucket(keys):
            is_stale = self._is_stale(bucket)
            with self._buckets.opened(bucket.id) as fd:
                for index in indices:
                    if is_stale:
                        statuses[index] = ReadStatus.STALE
                    elif fd is not None:
                        statuses[index] = self._read_page(keys[index], into[index], dir_fd=fd)
        return statuses

    def write(self, keys: Sequence[PageKey], pages: Sequence[memoryview]) -> list[WriteStatus]:
        statuses = [WriteStatus.STALE] * len(keys)
        for bucket, indices in _by_bucket(keys):
            if self._is_stale(bucket):
                continue
            try:
                self._buckets.make(bucket)
            except OSError as error:
                for index in indices:
                    statuses[index] = _status_of(error)
                continue
            with self._buckets.opened(bucket.id) as fd:
                for index in indices:
                    if fd is None:
                        statuses[index] = WriteStatus.SKIPPED
                    else:
                        statuses[index] = self._write_page(keys[index], pages[index], dir_fd=fd)
        return statuses

    def raise_generation(self, scope_id: bytes) -> int:
        try:
            return self.generations.raise_one(scope_id)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
        self._evictor.evict(1 << 20)  # a flush must not fail because of the pages that it covers
        return self.generations.raise_one(scope_id)

    def delete(self, keys: Sequence[PageKey]) -> int:
        num_deleted = 0
        for bucket, indices in _by_bucket(keys):
            with self._buckets.opened(bucket.id) as fd:
                if fd is not None:
                    num_deleted += sum(self._delete_page(keys[index], dir_fd=fd) for index in indices)
        return num_deleted

    def usage(self) -> StorageUsage:
        self.generations.current(())  # notices a deleted folder, whose ledger would be outdated
        usage = self._ledger.read().in_use
        return StorageUsage(usage.num_pages, usage.num_bytes, self._capacity_bytes)

    def reap(self, *, max_pages: int, abandoned: Collection[bytes]) -> int:
        self._staging.sweep()
        if time.monotonic() - self._counted_s > RECOUNT_INTERVAL_S:
            self._recount()
        num_deleted = self._trash.empty(max_pages=max_pages)
        if num_deleted < max_pages:
            self._trash.discard_unreachable(self.generations, abandoned=abandoned)
            num_deleted += self._trash.empty(max_pages=max_pages - num_deleted)
        return num_deleted

    def _recount(self) -> None:
        self._evictor.recount()
        self._counted_s = time.monotonic()

    def _is_stale(self, bucket: Bucket) -> bool:
        return is_outdated(bucket, self.generations.current(bucket.scope_ids))

    def _read_page(self, key: PageKey, into: memoryview, *, dir_fd: int) -> ReadStatus:
        try:
            fd = os.open(key.page.hex(), os.O_RDONLY | OPEN_FILE, dir_fd=dir_fd)
        except FileNotFoundError:
            return ReadStatus.MISS
        except OSError as error:
            if error.errno not in NOT_A_FOLDER:
                raise
            return ReadStatus.MISS  # a foreign link, which is not followed
        try:
            info = os.fstat(fd)
            defect = _read_verified(fd, key, into, num_file_bytes=info.st_size)
            if defect is None and not is_recent(info.st_mtime_ns):
                mtime_ns = recency_ns(key.depth)
                os.utime(fd, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(fd)
        if defect is None:
            return ReadStatus.HIT
        self._counters.add(f"defect_{defect}")
        self._delete_page(key, dir_fd=dir_fd)
        return ReadStatus.CORRUPT

    def _write_page(self, key: PageKey, page: memoryview, *, dir_fd: int) -> WriteStatus:
        mtime_ns = _page_mtime_ns(key, dir_fd=dir_fd)
        if mtime_ns is not None:
            if not is_recent(mtime_ns):
                _touch(key, dir_fd=dir_fd)
            return WriteStatus.PRESENT
        num_bytes = allocated_bytes(HEADER_BYTES + len(page))
        if num_bytes > self._capacity_bytes:
            return WriteStatus.FULL
        try:
            # the file before the reservation, so that a concurrent count sees one of them
            with self._staging.new_file(num_bytes=num_bytes) as staged:
                if not self._reserve(num_bytes):
                    return WriteStatus.FULL
                try:
                    staged.write(header_of(key, page), page, mtime_ns=recency_ns(key.depth))
                    staged.publish(key.page.hex(), dir_fd=dir_fd)
                except BaseException:
                    self._ledger.free(Usage(1, num_bytes))
                    raise
        except OSError as error:
            return _status_of(error)
        return WriteStatus.STORED

    def _reserve(self, num_bytes: int) -> bool:
        for _ in range(_RESERVE_ATTEMPTS):
            lacking = self._ledger.try_reserve(num_bytes, capacity_bytes=self._capacity_bytes)
            if lacking == 0:
                return True
            self._evictor.evict(lacking)
        return False

    def _delete_page(self, key: PageKey, *, dir_fd: int) -> int:
        return self._ledger.delete(lambda: _unlink_page(key, dir_fd=dir_fd)).num_pages


def _by_bucket(keys: Sequence[PageKey]) -> Iterator[tuple[Bucket, list[int]]]:
    groups: dict[Bucket, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key.bucket, []).append(index)
    return iter(groups.items())


def _page_mtime_ns(key: PageKey, *, dir_fd: int) -> int | None:
    try:
        info = os.stat(key.page.hex(), dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return info.st_mtime_ns if stat.S_ISREG(info.st_mode) else None


def _unlink_page(key: PageKey, *, dir_fd: int) -> Usage:
    name = key.page.hex()
    try:
        info = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
        if not stat.S_ISREG(info.st_mode):
            return Usage()
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return Usage()
    return Usage(1, allocated_bytes(info.st_size))


def _touch(key: PageKey, *, dir_fd: int) -> None:
    mtime_ns = recency_ns(key.depth)
    try:
        os.utime(key.page.hex(), ns=(mtime_ns, mtime_ns), dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return  # evicted at this moment: it costs one hit, no more


def _read_verified(fd: int, key: PageKey, into: memoryview, *, num_file_bytes: int) -> Defect | None:
    if num_file_bytes != HEADER_BYTES + len(into):
        return Defect.LENGTH
    header = bytearray(HEADER_BYTES)
    num_read = more = os.preadv(fd, [header, into], 0)
    while more and HEADER_BYTES <= num_read < num_file_bytes:  # rare: the read was interrupted
        more = os.preadv(fd, [into[num_read - HEADER_BYTES :]], num_read)
        num_read += more
    if num_read < num_file_bytes:
        return Defect.TRUNCATED
    return find_defect(key, header, into)


def _status_of(error: OSError) -> WriteStatus:
    """The page's status after an error of its write. Raises the error if the store itself has failed."""
    if error.errno in NO_ROOM:
        return WriteStatus.FULL
    if isinstance(error, FileNotFoundError | NotADirectoryError | FileExistsError | IsADirectoryError):
        return WriteStatus.SKIPPED  # its folder went to the trash meanwhile, or a foreign file is in its place
    raise error
