"""Tensors of a payload that lie in host memory, written as a safetensors bucket."""

import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from headwater.devices.safetensors_header import ITEM_BYTES, build_header
from headwater.transports.pickled.machine import PickleRefused
from headwater.transports.pickled.payload import HostTensorView, InlineStorage, SharedStorage
from headwater.transports.staging import SHARED_MEMORY

_OF_TORCH = re.compile(r"/torch_[0-9]+_[0-9]+_[0-9]+")
_COUNTER_BYTES = 64  # in front of the numbers of each, for the number of processes that use it
_MAX_BYTES = 1 << 40


def write_bucket(
    tensors: Sequence[tuple[str, HostTensorView]],
    write: Callable[[bytes | memoryview], None],
    *,
    shared_memory: Path = SHARED_MEMORY,
) -> None:
    """Write the bucket piece by piece. PickleRefused if a shared memory is gone or too small."""
    storages = _Storages(shared_memory)
    total = sum(_num_bytes(tensor) for _, tensor in tensors)
    if total > _MAX_BYTES:  # strides of 0 make any size of a few bytes
        raise PickleRefused(f"the tensors have {total} bytes together")
    write(build_header((name, tensor.dtype, tensor.shape) for name, tensor in tensors))
    for _, tensor in tensors:
        if _num_bytes(tensor):
            for rows in _in_order(tensor, storages.open(tensor.storage)):
                write(rows)


class _Storages:
    """Each shared memory is opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[SharedStorage, memoryview] = {}

    def open(self, storage: InlineStorage | SharedStorage) -> memoryview:
        if isinstance(storage, InlineStorage):
            return storage.data
        if storage not in self._opened:
            self._opened[storage] = self._map(storage)
        return self._opened[storage]

    def _map(self, storage: SharedStorage) -> memoryview:
        if not _OF_TORCH.fullmatch(storage.name):
            raise PickleRefused(f"{storage.name!r} is no shared memory of PyTorch")
        try:
            descriptor = os.open(self._folder / storage.name[1:], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise PickleRefused(f"the shared memory {storage.name} cannot be opened: {error.strerror}") from None
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size < _COUNTER_BYTES + storage.num_bytes:
                raise PickleRefused(f"the shared memory {storage.name} is smaller than its tensors")
            return _read(descriptor, storage)
        finally:
            os.close(descriptor)


def _read(descriptor: int, storage: SharedStorage) -> memoryview:
    """A copy: a mapping would end this process if the sender cut its memory off."""
    numbers = memoryview(bytearray(storage.num_bytes))
    at = 0
    while at < len(numbers):
        count = os.preadv(descriptor, [numbers[at:]], _COUNTER_BYTES + at)
        if count == 0:
            raise PickleRefused(f"the shared memory {storage.name} became smaller")
        at += count
    return numbers.toreadonly()


def _num_bytes(tensor: HostTensorView) -> int:
    count = ITEM_BYTES[tensor.dtype]
    for length in tensor.shape:
        count *= length
    return count


def _in_order(tensor: HostTensorView, storage: memoryview):
    """The tensor's bytes row by row; a contiguous one in one piece."""
    size = ITEM_BYTES[tensor.dtype]
    numbers = np.frombuffer(storage, dtype=f"V{size}", count=len(storage) // size)
    view = np.lib.stride_tricks.as_strided(
        numbers[tensor.offset :],
        shape=tensor.shape,
        strides=tuple(step * size for step in tensor.strides),
        writeable=False,
    )
    if view.flags.c_contiguous:
        yield storage[tensor.offset * size : tensor.offset * size + _num_bytes(tensor)]
        return
    for part in view if view.ndim else (view,):
        yield np.ascontiguousarray(part).tobytes()
