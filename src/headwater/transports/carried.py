"""Tensors that the front of a fleet carries to a replica on another machine, file by file and in pieces."""

import os
import re
from collections.abc import Collection

from headwater.transports.staging import StagedFolder, StagingArea

PIECE_BYTES = 4 << 20
_ID = re.compile(r"[0-9a-f]{32}")
_BUCKET = re.compile(r"[0-9]{6}\.safetensors")


class CarriedWeights:
    """Folders in the staging area of a replica, by the identity of the weights. The front says which it still needs."""

    def __init__(self, area: StagingArea) -> None:
        self._area = area
        self._folders: dict[str, StagedFolder] = {}

    def write(self, weights_id: str, *, bucket: str, offset: int, data: bytes, keep: Collection[str] = ()) -> str:
        """Put a piece in its place, which may be done again, and return the folder's path.

        Weights that are neither these nor in `keep` are deleted. ValueError for a name that no front gives. StagingFull
        if the piece does not fit.
        """
        if not _ID.fullmatch(weights_id) or not _BUCKET.fullmatch(bucket) or offset < 0:
            found = f"{weights_id!r}, {bucket!r}, {offset}"
            raise ValueError(f"weights_id, bucket, offset: no front sends {found}")
        for other in self._folders.keys() - {*keep, weights_id}:
            self._folders.pop(other).delete()
        folder = self._folders.get(weights_id)
        if folder is None:
            folder = self._folders[weights_id] = self._area.folder()
        file = os.open(folder.path / bucket, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            growth = max(0, offset + len(data) - os.fstat(file).st_size)
            self._area.check_room(growth)
            folder.num_bytes += growth
            view = memoryview(data)
            while view:
                written = os.pwrite(file, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(file)
        return str(folder.path)
