"""The bucket folders of a file store. Each is created and removed in one step, so that none is incomplete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from headwater.storage.file.bucket_record import decode_bucket, encode_bucket
from headwater.storage.file.folder import (
    NOT_A_FOLDER,
    OPEN_FILE,
    OPEN_FOLDER,
    StoreFolder,
    StoreVanished,
    is_hash_name,
    new_nonce,
    read_small,
    write_all,
)
from headwater.storage.file.staging import Staging
from headwater.storage.page_key import Bucket

RECORD = "record"


class BucketFolders:
    """Finds, makes and discards the folders of buckets, without regard to their pages."""

    def __init__(self, folder: StoreFolder, staging: Staging) -> None:
        self._folder = folder
        self._staging = staging
        self._records: dict[bytes, Bucket | None] = {}  # from disk; a record never changes

    @contextmanager
    def opened(self, bucket_id: bytes) -> Iterator[int | None]:
        """The open folder of a bucket; None if there is none, or if the name is not a folder."""
        try:
            fd = os.open(bucket_id.hex(), OPEN_FOLDER, dir_fd=self._folder.buckets_fd)
        except FileNotFoundError:
            fd = None
        except OSError as error:
            if error.errno not in NOT_A_FOLDER:
                raise
            fd = None
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def make(self, bucket: Bucket) -> None:
        """Make the folder with its record unless it exists."""
        name = bucket.id.hex()
        if _exists(name, dir_fd=self._folder.buckets_fd):
            return
        staged = self._staging.make_folder()
        try:
            path = os.path.join(staged, RECORD)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FILE
            fd = os.open(path, flags, 0o600, dir_fd=self._folder.staging_fd)
            try:
                write_all(fd, encode_bucket(bucket))
            finally:
                os.close(fd)
            self._staging.publish_folder(staged, target=name, dir_fd=self._folder.buckets_fd)
        except OSError as error:
            self._staging.discard_folder(staged)
            if isinstance(error, FileNotFoundError):
                raise StoreVanished from None
            if not _exists(name, dir_fd=self._folder.buckets_fd):  # else another process was faster
                raise

    def ids(self) -> list[bytes]:
        """The ids of all buckets on disk, of all servers and models."""
        names = os.listdir(self._folder.buckets_fd)
        found = [bytes.fromhex(name) for name in names if is_hash_name(name)]
        self._records = {bucket_id: self._records[bucket_id] for bucket_id in found if bucket_id in self._records}
        return found

    def record(self, bucket_id: bytes) -> Bucket | None:
        """The scopes and generations of a bucket; None if its record cannot be read."""
        if bucket_id not in self._records:
            with self.opened(bucket_id) as fd:
                try:
                    content = b"" if fd is None else read_small(RECORD, dir_fd=fd)
                except OSError:
                    return None
            self._records[bucket_id] = decode_bucket(bucket_id, content)
        return self._records[bucket_id]

    def discard(self, bucket_id: bytes) -> bool:
        """Move a bucket to the trash in one step; False if another process did.

        Processes that have it open still read and write there; their writes are deleted with the rest.
        """
        name = bucket_id.hex()
        folder = self._folder
        try:
            os.rename(
                name, f"{name}-{new_nonce()}", src_dir_fd=folder.buckets_fd, dst_dir_fd=folder.trash_fd
            )
        except FileNotFoundError:
            return False
        return True


def _exists(name: str, *, dir_fd: int) -> bool:
    try:
        os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
