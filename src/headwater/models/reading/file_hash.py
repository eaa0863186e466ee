"""The hash of everything that decides what KV a model computes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from headwater.models.model_files import open_regular, read_into

LARGE_BYTES = 1 << 30  # files of so many bytes in all are hashed in pieces
_PIECE_BYTES = 16 << 20
_ID_BYTES = 16


def hash_of(parts: Sequence[str], paths: Sequence[Path], *, num_threads: int = 1) -> str:
    """32 hex digits. A file's bytes include its tensors' names, shapes and dtypes; file names do not count.

    One thread hashes about 1 GB/s. So of large files the hashes of their pieces are hashed, which several threads find.
    """
    digest = hashlib.blake2b(digest_size=_ID_BYTES)
    digest.update("\n".join(parts).encode())
    pieces = [(path, start) for path in paths for start in range(0, os.stat(path).st_size, _PIECE_BYTES)]
    is_large = sum(os.stat(path).st_size for path in paths) >= LARGE_BYTES
    if not is_large:
        for path in paths:
            for block in _blocks(path):
                digest.update(block)
        return digest.hexdigest()
    if num_threads == 1:  # in the caller's thread: one that hangs in a read must not keep the process from ending
        found = map(_piece_hash, pieces)
        for each in found:
            digest.update(each)
        return digest.hexdigest()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="weights-id") as pool:
        for each in pool.map(_piece_hash, pieces):
            digest.update(each)
    return digest.hexdigest()


def _piece_hash(piece: tuple[Path, int]) -> bytes:
    path, start = piece
    with open_regular(path) as file:
        size = min(_PIECE_BYTES, os.fstat(file.fileno()).st_size - start)
        buffer = bytearray(size)
        read_into(file, path, memoryview(buffer), offset=start)
    return hashlib.blake2b(buffer, digest_size=_ID_BYTES).digest()


def _blocks(path: Path) -> Iterator[bytes]:
    with open_regular(path) as file:
        while block := file.read(_PIECE_BYTES // 4):
            yield block
