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
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.multiprocessing.reductions import reduce_tensor

from headwater.devices.gpu_note import FILLED, FREED, set_state, write_note

CHUNK_BYTES = 16 << 20
_NUM_THREADS = 16
Piece = tuple[torch.Tensor, int]  # uint8[n], contiguous, and its place in the file


class FileWriter:
    """Threads that copy pieces through pinned memory of their own. It stays for the next bucket."""

    def __init__(self, num_threads: int | None = None) -> None:
        self._own = threading.local()
        num_threads = num_threads or min(_NUM_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="copy-out")
        self._held: list[_Held] = []

    def write(self, descriptor: int, header: bytes, pieces: Sequence[Piece]) -> None:
        """Make the file of a header and pieces behind it. OSError if the file system is full.

        Kernels that make the tensors must have ended. A file system that fills up meanwhile ends the process (SIGBUS).
        """
        for future in self._fill(_mapped(descriptor, header, pieces), pieces):
            future.result()

    def hold(self, path: Path, descriptor: int, header: bytes, pieces: Sequence[Piece], *, spare_bytes: int) -> bool:
        """Copy the pieces within the GPU, note that beside the file, and fill the file in the background.

        False, and nothing was done, if the pieces lie in host memory, or less than `spare_bytes` would stay free on
        the GPU: the engine needs them for its own copy.
        """
        num_bytes = sum(len(tensor) for tensor, _ in pieces)
        if spare_bytes < 0 or not num_bytes or free_bytes(pieces) < num_bytes + spare_bytes:
            return False
        try:
            flat = torch.cat([tensor for tensor, _ in pieces])
        except torch.OutOfMemoryError:
            return False
        wait_for_kernels([flat])
        target = _mapped(descriptor, header, pieces)
        note = write_note(path, share(flat))
        copied = [(flat, len(header))]
        self._held.append(_Held(flat, note, self._fill(target, copied)))
        threading.Thread(target=self._held[-1].wait, name="note-filled", daemon=True).start()
        return True

    def drop_held(self) -> None:
        """Free what `hold` keeps in GPU memory."""
        held, self._held = self._held, []
        for each in held:
            each.drop()
        if held and torch.cuda.is_initialized():
            del held, each
            torch.cuda.empty_cache()
            torch.cuda.ipc_collect()

    def _fill(self, target: npt.NDArray[np.uint8], pieces: Sequence[Piece]) -> list[Future[None]]:
        return [self._threads.submit(self._copy, target, chunk, at) for chunk, at in _chunks(pieces)]

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


def _mapped(descriptor: int, header: bytes, pieces: Sequence[Piece]) -> npt.NDArray[np.uint8]:
    """The file in memory, with its header. OSError if the file system has no room."""
    num_bytes = max([len(header), *(at + len(tensor) for tensor, at in pieces)])
    found = os.fstatvfs(descriptor)
    if found.f_bavail * found.f_frsize + os.fstat(descriptor).st_blocks * 512 < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, num_bytes)
    memory = mmap.mmap(descriptor, num_bytes)
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)  # where the system allows it for shared memory
    target = np.frombuffer(memory, dtype=np.uint8)
    target[: len(header)] = np.frombuffer(header, dtype=np.uint8)
    return target


class _Held:
    """A bucket in GPU memory, whose file is being filled. `note`: the descriptor of its note."""

    def __init__(self, flat: torch.Tensor, note: int, filling: Sequence[Future[None]]) -> None:
        self._flat: torch.Tensor | None = flat
        self._note = note
        self._filling = filling
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Until the file is whole, which is noted."""
        for future in self._filling:
            future.result()
        with self._lock:
            if self._flat is not None:
                set_state(self._note, FILLED)

    def drop(self) -> None:
        """Free the memory once the file is whole. First the note says so: a reader looks again afterwards."""
        self.wait()
        with self._lock:
            set_state(self._note, FREED)
            os.close(self._note)
            self._flat = None


def free_bytes(pieces: Sequence[Piece]) -> int:
    """What is free on the GPU of the pieces, with what this process has cached; 0 if they lie in host memory."""
    device = pieces[0][0].device
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def share(flat: torch.Tensor) -> tuple[Any, ...]:
    """How another process opens a tensor of bytes, as `launch.receiving.tensors` takes a trainer's."""
    reduced: Any = reduce_tensor(flat)  # of a tensor on a GPU
    _, size, stride, offset, _, _, device, *more = reduced[1]
    return (list(size), list(stride), offset, "uint8", device, *more)


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
