"""Copies tensors out of a GPU into a mapped file in shared memory, in threads.

One thread fills new pages of shared memory at 2 GB/s, and writes to one file wait for each other. Pages of a mapping
are made by all threads at the same time.
"""

import contextlib
import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

CHUNK_BYTES = 16 << 20
_NUM_THREADS = 16
Piece = tuple[torch.Tensor, int]  # uint8[n], contiguous, and its place in the file


class FileWriter:
    """Threads that copy pieces through pinned memory of their own. It stays for the next bucket."""

    def __init__(self, num_threads: int | None = None) -> None:
        self._own = threading.local()
        num_threads = num_threads or min(_NUM_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="copy-out")

    def write(self, descriptor: int, header: bytes, pieces: Sequence[Piece]) -> None:
        """Make the file of a header and pieces behind it. OSError if the file system is full.

        Kernels that make the tensors must have ended. A file system that fills up meanwhile ends the process (SIGBUS).
        """
        num_bytes = max([len(header), *(at + len(tensor) for tensor, at in pieces)])
        found = os.fstatvfs(descriptor)
        if found.f_bavail * found.f_frsize < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(descriptor, num_bytes)
        memory = mmap.mmap(descriptor, num_bytes)
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)  # where the system allows it for shared memory
        target = np.frombuffer(memory, dtype=np.uint8)
        target[: len(header)] = np.frombuffer(header, dtype=np.uint8)
        futures = [self._threads.submit(self._copy, target, chunk, at) for chunk, at in _chunks(pieces)]
        for future in futures:
            future.result()

    def _copy(self, target: npt.NDArray[np.uint8], chunk: torch.Tensor, at: int) -> None:
        if chunk.is_cuda:
            chunk = self._to_pinned(chunk)
        np.copyto(target[at : at + len(chunk)], chunk.numpy())  # other threads run meanwhile

    def _to_pinned(self, chunk: torch.Tensor) -> torch.Tensor:
        """The chunk in this thread's buffer, valid until its next one."""
        buffers: dict[torch.device, tuple[torch.Tensor, torch.cuda.Stream]] = self._own.__dict__.setdefault("of", {})
        if chunk.device not in buffers:
            memory = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
            buffers[chunk.device] = memory, torch.cuda.Stream(chunk.device)
        buffer, stream = buffers[chunk.device]
        with torch.cuda.device(chunk.device), torch.cuda.stream(stream):
            found = buffer[: len(chunk)]
            found.copy_(chunk, non_blocking=True)
            stream.synchronize()
        return found


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor in row-major order: uint8[n], a view where they lie so."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def wait_for_kernels(tensors: Sequence[torch.Tensor]) -> None:
    """Until everything that was launched in this thread on the tensors' GPUs has ended."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _chunks(tensors: Sequence[Piece]) -> Iterator[Piece]:
    for tensor, at in tensors:
        for first in range(0, len(tensor), CHUNK_BYTES):
            yield tensor[first : first + CHUNK_BYTES], at + first
