"""Deletes the unreachable pages of a file store, in small portions."""

import os
from collections.abc import Collection

from headwater.storage.backend import is_outdated
from headwater.storage.file.buckets import RECORD, BucketFolders
from headwater.storage.file.eviction import page_files
from headwater.storage.file.folder import NOT_A_FOLDER, OPEN_FOLDER, StoreFolder
from headwater.storage.file.generations import FileGenerations
from headwater.storage.file.usage import Usage, UsageLedger, allocated_bytes

_PORTION = 32  # pages deleted while the lock is held: a few milliseconds


class Trash:
    """Discarded buckets. Each is discarded in one step, then any process deletes its pages one by one."""

    def __init__(self, folder: StoreFolder, buckets: BucketFolders, *, ledger: UsageLedger) -> None:
        self._folder = folder
        self._buckets = buckets
        self._ledger = ledger

    def discard_unreachable(self, generations: FileGenerations, *, abandoned: Collection[bytes]) -> None:
        """Discard the buckets whose counters have been raised, and those in `abandoned`.

        A bucket with an unreadable record stays, since another version may use it; eviction still covers it.
        """
        for bucket_id in self._buckets.ids():
            if bucket_id not in abandoned:
                bucket = self._buckets.record(bucket_id)
                if bucket is None or not is_outdated(bucket, generations.current(bucket.scope_ids)):
                    continue
            self._buckets.discard(bucket_id)

    def empty(self, *, max_pages: int) -> int:
        """Delete up to `max_pages` pages; return their number."""
        num_deleted = 0
        for name in os.listdir(self._folder.trash_fd):
            if num_deleted >= max_pages:
                break
            num_deleted += self._empty_one(name, max_pages - num_deleted)
        return num_deleted

    def _empty_one(self, name: str, max_pages: int) -> int:
        try:
            fd = os.open(name, OPEN_FOLDER, dir_fd=self._folder.trash_fd)
        except FileNotFoundError:
            return 0  # emptied by another process
        except OSError as error:
            if error.errno not in NOT_A_FOLDER:
                raise
            return 0  # a foreign link or file
        try:
            num_deleted = 0
            while num_deleted < max_pages:
                portion = min(_PORTION, max_pages - num_deleted)
                deleted = self._ledger.delete(lambda portion=portion: _delete_pages(fd, portion)).num_pages
                num_deleted += deleted
                if deleted < portion:
                    _unlink(RECORD, dir_fd=fd)
                    self._remove_folder(name)
                    break
            return num_deleted
        finally:
            os.close(fd)

    def _remove_folder(self, name: str) -> None:
        try:
            os.rmdir(name, dir_fd=self._folder.trash_fd)
        except OSError:
            return  # a late page, which the next call deletes, or a foreign file, which stays


def _delete_pages(dir_fd: int, max_pages: int) -> Usage:
    deleted = Usage()
    for name, info in page_files(dir_fd):
        if deleted.num_pages == max_pages:
            break
        if _unlink(name, dir_fd=dir_fd):
            deleted = deleted.plus(Usage(1, allocated_bytes(info.st_size)))
    return deleted


def _unlink(name: str, *, dir_fd: int) -> bool:
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    return True
