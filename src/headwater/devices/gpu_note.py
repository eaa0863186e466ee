"""A note beside a staged bucket: its tensors also lie in GPU memory of the process that received them.

The file of the bucket is filled from there in the background, so engines read the memory until then. The note lies in
the server's private folder, and only that process writes it: no client can have memory opened. Standard library alone.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIX = ".gpu"
FILLING, FILLED, FREED = b"0", b"1", b"2"  # the file: see `GpuNote.state`


@dataclass(frozen=True, slots=True)
class GpuNote:
    """`handle`: how PyTorch opens the memory, which holds the bytes of all tensors in the order of the file.

    `state`: FILLING, the file is not whole; FILLED, both are there; FREED, the memory may hold something else by now.
    """

    state: bytes
    handle: tuple[Any, ...]


def note_path(bucket: Path) -> Path:
    return bucket.with_suffix(SUFFIX)


def write_note(bucket: Path, handle: tuple[Any, ...]) -> int:
    """Write the note of a bucket that is being filled; the descriptor by which `set_state` changes it."""
    text = json.dumps([{"bytes": it.hex()} if isinstance(it, bytes) else it for it in handle]).encode()
    descriptor = os.open(note_path(bucket), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.write(descriptor, FILLING + text)
    return descriptor


def set_state(descriptor: int, state: bytes) -> None:
    os.pwrite(descriptor, state, 0)


def read_note(bucket: Path) -> GpuNote | None:
    """The note of a bucket; None if there is none: then its file is whole."""
    try:
        data = note_path(bucket).read_bytes()
    except FileNotFoundError:
        return None
    items = json.loads(data[1:])
    handle = [bytes.fromhex(it["bytes"]) if isinstance(it, dict) else it for it in items]
    return GpuNote(data[:1], tuple(tuple(it) if isinstance(it, list) else it for it in handle))
