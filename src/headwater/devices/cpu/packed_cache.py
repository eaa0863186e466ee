"""The user's cache of packed weights: a file for each set of files, form, code and instruction set.

Engines map these files (packed_file.py), so that a start neither reads, packs nor hashes the model again. The key is
the caller's word for the weights, and a hash of the code that makes packed weights of them.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from headwater.devices.cpu.kernel_library import KernelLibrary
from headwater.devices.cpu.packed_file import DamagedFile, PackedFile, Parts, packed_bytes, write_packed

_SUFFIX = ".packed"
_OTHER_VERSIONS_S = 3600
_MIN_BYTES = 16 << 20  # smaller models are packed within milliseconds
_DEVICES = Path(__file__).parents[1]
_MODELS = _DEVICES.parent / "models"
_CODE = (
    _DEVICES,
    _DEVICES / "cpu",
    _DEVICES / "cpu" / "experts",
    _MODELS,
    _MODELS / "experts",
    _MODELS / "quantised",
    _MODELS / "ranks",
)  # reads and packs weights

_log = logging.getLogger(__name__)


class PackedCache:
    """Files of packed weights in `folder`, of `max_bytes` in all.

    The least recently used ones go, and those that another version of the code has not used for an hour.
    """

    def __init__(self, folder: Path, *, max_bytes: int, library: KernelLibrary, min_bytes: int = _MIN_BYTES) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._min_bytes = min_bytes
        self._library = library
        self._storing: threading.Thread | None = None

    def open(self, weights: str) -> PackedFile | None:
        """The packed weights that were stored for this key. None if there are none, or the file is damaged."""
        key = self._key(weights)
        path = self._path(key)
        try:
            packed = PackedFile(path, key=key, library=self._library)
            os.utime(path)
        except FileNotFoundError:
            return None
        except (DamagedFile, OSError, ValueError) as error:
            _log.warning("%s is not used, and made anew: %s", path, error)
            return None
        return packed

    def store(self, weights: str, parts: Parts, *, weights_id: str, num_bytes: int) -> None:
        """Keep packed weights for later starts, in a thread: the caller does not wait, and must not change them."""
        size = packed_bytes(parts.values())
        if not self._min_bytes <= size <= self._max_bytes:
            return
        key = self._key(weights)

        def run() -> None:
            try:
                self._write(key, parts, size=size, weights_id=weights_id, num_bytes=num_bytes)
            except OSError as error:
                _log.warning("the packed weights are not kept for the next start: %s", error)

        self._storing = threading.Thread(target=run, name="store-weights", daemon=True)
        self._storing.start()

    def wait(self) -> None:
        """Wait for `store`."""
        if self._storing is not None:
            self._storing.join()

    def _write(self, key: str, parts: Parts, *, size: int, weights_id: str, num_bytes: int) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _only_writer(self._folder) as is_ours:
            if not is_ours:  # another engine stores these weights, or will store others at its next start
                return
            self._make_room(size)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", suffix=".tmp", delete=False) as file:
                write_packed(file, parts, key=key, weights_id=weights_id, num_bytes=num_bytes)
                file.flush()
                os.fsync(file.fileno())  # before the name: a crash leaves no file with a name and without contents
            os.replace(file.name, self._path(key))
        _log.info("packed weights are kept in %s: the next start maps them", self._path(key))

    def _make_room(self, size: int) -> None:
        """Remove what writers have left behind, and files that are too many. OSError if the disk is too full."""
        for left in self._folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        found = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self._folder.glob(f"*{_SUFFIX}"))
        total = sum(num_bytes for _, num_bytes, _ in found)
        for used_s, num_bytes, path in found:
            is_old = not path.name.startswith(self._version()) and used_s < time.time() - _OTHER_VERSIONS_S
            if is_old or total + size > self._max_bytes:
                path.unlink(missing_ok=True)
                total -= num_bytes
        if shutil.disk_usage(self._folder).free < 2 * size:
            raise OSError(f"{self._folder} has too little room for {size >> 20} MiB")

    def _key(self, weights: str) -> str:
        return f"{self._version()}-{hashlib.blake2b(weights.encode(), digest_size=16).hexdigest()}"

    def _version(self) -> str:
        """A hash of the code and the instruction set."""
        made_by = f"{self._library.path.name}\n{_code_hash()}"
        return hashlib.blake2b(made_by.encode(), digest_size=8).hexdigest()

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[bool]:
    """Whether no other process writes to the folder. The system ends the claim with the process."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@cache
def _code_hash() -> str:
    """A hash of the sources that read and pack weights; those in C are part of the library's name."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for folder in _CODE for path in folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
