"""Pinned host memory for a GPU, registered with the driver in the background, piece by piece."""

import logging
import mmap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_log = logging.getLogger(__name__)
_PIECE_BYTES = 64 << 20  # short enough that launches do not wait noticeably for the driver's lock
_NUM_THREADS = 4  # one core touches 2 to 4 GB/s of new memory
_PORTABLE_AND_MAPPED = 0x01 | 0x02  # cudaHostRegisterPortable | cudaHostRegisterMapped

Register = Callable[[int, int], None]
Unregister = Callable[[int], None]


def register_with_driver(address: int, num_bytes: int) -> None:
    """Pin `num_bytes` of host memory and map them for the GPU. OSError with the driver's reason."""
    runtime: Any = torch.cuda.cudart()
    error = runtime.cudaHostRegister(address, num_bytes, _PORTABLE_AND_MAPPED)
    if int(error) != 0:
        reason = runtime.cudaGetErrorString(error)
        raise OSError(f"the driver does not pin {num_bytes} bytes of host memory: {reason}")


def unregister_with_driver(address: int) -> None:
    """Undo `register_with_driver`, which was called with the same address."""
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)


class PinnedHostMemory:
    """`num_pages` pages of `page_bytes` bytes, page-first: all layers of a page are one contiguous run.

    Threads touch and register the memory, from the first page on, so the start of the server does not wait for it.
    `wait_ready` waits for the pages of one copy. `buffer`: memory that other ranks map and register as well.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_bytes: int,
        buffer: mmap.mmap | None = None,
        register: Register = register_with_driver,
        unregister: Unregister = unregister_with_driver,
    ) -> None:
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self._register = register
        self._unregister = unregister
        self._is_closing = False
        self._is_shared = buffer is not None
        memory = buffer or mmap.mmap(-1, num_pages * page_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE") and not self._is_shared:
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8, count=num_pages * page_bytes)
        self.pages: npt.NDArray[np.uint8] = self._bytes.reshape(num_pages, page_bytes)
        self._num_ready_bytes = 0
        self._error: OSError | None = None
        self._changed = threading.Condition()
        self._registering = threading.Lock()
        self._thread = threading.Thread(target=self._prepare, name="pin-host-memory", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Unpin the memory; it is freed with the last view of it. No copy may be in flight."""
        self._is_closing = True
        self._thread.join()
        for start in range(0, self._num_ready_bytes, _PIECE_BYTES):
            self._unregister(self._bytes[start:].ctypes.data)
        self._num_ready_bytes = 0

    def view(self, page: int) -> memoryview:
        """A writable view of one page."""
        return memoryview(self.pages[page])

    @property
    def num_ready_pages(self) -> int:
        """Pages, from the first on, that the GPU can reach."""
        return self._num_ready_bytes // self.page_bytes

    @property
    def num_ready_bytes(self) -> int:
        """Bytes, from the first page on, that the GPU can reach."""
        return self._num_ready_bytes

    def wait_ready(self, pages: npt.NDArray[np.int32]) -> None:
        """Wait until the GPU can reach `pages`. OSError if it never will."""
        needed_bytes = (int(pages.max()) + 1) * self.page_bytes
        if self._num_ready_bytes >= needed_bytes:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._num_ready_bytes >= needed_bytes or self._error is not None)
            if self._num_ready_bytes < needed_bytes:
                assert self._error is not None
                raise self._error

    def _prepare(self) -> None:
        pieces = range(0, len(self._bytes), _PIECE_BYTES)
        began_s = time.monotonic()
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="pin-host-memory") as pool:
            try:
                for num_bytes in pool.map(self._prepare_piece, pieces):  # in order
                    if num_bytes == 0:
                        break  # closing
                    with self._changed:
                        self._num_ready_bytes += num_bytes
                        self._changed.notify_all()
                gib, seconds = self._num_ready_bytes / (1 << 30), time.monotonic() - began_s
                _log.info("%.1f GiB of host memory for the cache are pinned, after %.1f s", gib, seconds)
            except OSError as error:
                pool.shutdown(cancel_futures=True)
                _log.error("host memory for the cache: %s; pages beyond it are not offloaded", error)
                with self._changed:
                    self._error = error
                    self._changed.notify_all()

    def _prepare_piece(self, start: int) -> int:
        if self._is_closing:
            return 0
        piece = self._bytes[start : start + _PIECE_BYTES]
        if self._is_shared:  # reading allocates it as well, and another rank may have written to it
            piece[:: mmap.PAGESIZE].max()
        else:
            piece[:: mmap.PAGESIZE] = 0  # touched outside the driver's lock and the interpreter's
        with self._registering:  # one at a time, so that a launch waits for one at most
            self._register(piece.ctypes.data, len(piece))
        return len(piece)
