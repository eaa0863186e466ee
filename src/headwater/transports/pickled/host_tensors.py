"""Tensors of a payload that lie in host memory, written as a safetensors bucket."""

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from headwater.devices.safetensors_header import ITEM_BYTES, build_header
from headwater.transports.pickled.machine import PickleRefused
from headwater.transports.pickled.payload import HostTensorView, InlineStorage, SharedStorage
from headwater.transports.staging import SHARED_MEMORY

_OF_TORCH = re.compile(r"/torch_[0-9]+_[0-9]+_[0-9]+")
_COUNTER_BYTES = 64  # in front of the numbers of each, for the number of processes that use it
_MAX_BYTES = 1 << 40
_PIECE_BYTES = 4 << 20  # which stay in the processor's cache until they are written


def write_bucket(
    tensors: Sequence[tuple[str, HostTensorView]],
    write: Callable[[bytes | memoryview], None],
    *,
    reserve: Callable[[int], None] = lambda num_bytes: None,
    shared_memory: Path = SHARED_MEMORY,
) -> None:
    """Write the bucket piece by piece. PickleRefused if a shared memory is gone or too small.

    `reserve` gets its size before anything is written. A piece is valid until `write` returns.
    """
    storages = _Storages(shared_memory)
    total = sum(_num_bytes(tensor) for _, tensor in tensors)
    if total > _MAX_BYTES:  # strides of 0 make any size of a few bytes
        raise PickleRefused(f"the tensors have {total} bytes together")
    header = build_header((name, tensor.dtype, tensor.shape) for name, tensor in tensors)
    reserve(len(header) + total)
    write(header)
    for _, tensor in tensors:
        if num_bytes := _num_bytes(tensor):
            first = tensor.offset * ITEM_BYTES[tensor.dtype]
            is_plain = _is_row_major(tensor)
            for piece in storages.pieces(tensor.storage, first, num_bytes) if is_plain else _rows(tensor, storages):
                write(piece)


class _Storages:
    """Memory of the sender, read through one small buffer. Mapped, it would end this process if it were cut off."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._buffer = memoryview(bytearray(_PIECE_BYTES))
        self._whole: dict[SharedStorage, memoryview] = {}  # of tensors that are not row-major

    def pieces(self, storage: InlineStorage | SharedStorage, first: int, num_bytes: int) -> Iterator[memoryview]:
        """Bytes of a storage in order; each piece is valid until the next one."""
        if isinstance(storage, InlineStorage):
            yield storage.data[first : first + num_bytes]
            return
        descriptor = self._open(storage)
        try:
            end = first + num_bytes
            while first < end:
                piece = self._buffer[: end - first]
                _read(descriptor, piece, _COUNTER_BYTES + first, storage)
                yield piece
                first += len(piece)
        finally:
            os.close(descriptor)

    def whole(self, storage: InlineStorage | SharedStorage) -> memoryview:
        """All of a storage; of shared memory a copy, which is made once."""
        if isinstance(storage, InlineStorage):
            return storage.data
        if storage not in self._whole:
            numbers = memoryview(bytearray(storage.num_bytes))
            descriptor = self._open(storage)
            try:
                _read(descriptor, numbers, _COUNTER_BYTES, storage)
            finally:
                os.close(descriptor)
            self._whole[storage] = numbers.toreadonly()
        return self._whole[storage]

    def _open(self, storage: SharedStorage) -> int:
        if not _OF_TORCH.fullmatch(storage.name):
            raise PickleRefused(f"{storage.name!r} is no shared memory of PyTorch")
        try:
            descriptor = os.open(self._folder / storage.name[1:], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise PickleRefused(f"the shared memory {storage.name} cannot be opened: {error.strerror}") from None
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size < _COUNTER_BYTES + storage.num_bytes:
            os.close(descriptor)
            raise PickleRefused(f"the shared memory {storage.name} is smaller than its tensors")
        return descriptor


def _read(descriptor: int, into: memoryview, at: int, storage: SharedStorage) -> None:
    while into:
        count = os.preadv(descriptor, [into], at)
        if count == 0:
            raise PickleRefused(f"the shared memory {storage.name} became smaller")
        into, at = into[count:], at + count


def _is_row_major(tensor: HostTensorView) -> bool:
    step = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if length > 1 and stride != step:
            return False
        step *= length
    return True


def _num_bytes(tensor: HostTensorView) -> int:
    count = ITEM_BYTES[tensor.dtype]
    for length in tensor.shape:
        count *= length
    return count


def _rows(tensor: HostTensorView, storages: _Storages) -> Iterator[bytes]:
    """The tensor's bytes row by row."""
    size = ITEM_BYTES[tensor.dtype]
    storage = storages.whole(tensor.storage)
    numbers = np.frombuffer(storage, dtype=f"V{size}", count=len(storage) // size)
    view = np.lib.stride_tricks.as_strided(
        numbers[tensor.offset :],
        shape=tensor.shape,
        strides=tuple(step * size for step in tensor.strides),
        writeable=False,
    )
    for part in view:
        yield np.ascontiguousarray(part).tobytes()
