"""Tensors from a trainer's process group or its GPU memory, written as safetensors files in shared memory."""

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from headwater.devices.cuda.torch_tensors import open_shared
from headwater.devices.safetensors_header import ITEM_BYTES, build_header
from headwater.launch.receiving.device_copies import FileWriter, as_bytes, wait_for_kernels
from headwater.launch.receiving.vllm_communicator import join_vllm
from headwater.messages.receiving import VLLM, CopyFromGpu, JoinGroup, ReceiveBucket

# MADV_POPULATE_READ: maps 16 pages of the file at a time. Written to unmapped, each page takes a fault of its own.
_POPULATE_READ = 22
Broadcast = Callable[[Iterable[torch.Tensor]], None]
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Group:
    """A member of a trainer's process group. Rank 0 broadcasts."""

    def __init__(self, broadcast: Broadcast, device: torch.device, writer: FileWriter) -> None:
        """`broadcast` receives tensors in their order, on a GPU when its stream gets there."""
        self._broadcast = broadcast
        self._device = device
        self._writer = writer

    def receive(self, call: ReceiveBucket) -> None:
        """Receive a bucket; its file is whole when this returns."""
        if self._device.type != "cpu":
            self._receive_on_gpu(call)
            return
        bucket = _Bucket(call.names, call.dtypes, call.shapes, path=call.path)
        self._broadcast(bucket.pieces(_piece_sizes(call)) if call.is_flattened else bucket.tensors())

    def _receive_on_gpu(self, call: ReceiveBucket) -> None:
        if call.is_flattened:
            sizes = _piece_sizes(call)
            received = [torch.empty(num_bytes, dtype=torch.uint8, device=self._device) for num_bytes in sizes]
        else:
            received = [
                torch.empty(shape, dtype=_DTYPES[dtype], device=self._device)
                for dtype, shape in zip(call.dtypes, call.shapes, strict=True)
            ]
        self._broadcast(received)
        wait_for_kernels(received)
        if call.path:
            _write_file(call, received, self._writer)


def join_group(call: JoinGroup, writer: FileWriter) -> Group:
    """Meet the trainer. RuntimeError of PyTorch if not all ranks come in time.

    The group is named and its store prefixed as SGLang's trainers do, so that both sides find each other.
    """
    device = torch.device("cpu") if call.device is None else torch.device("cuda", call.device)
    if call.device is not None:
        torch.cuda.set_device(device)
    if call.backend == VLLM:
        return Group(join_vllm(call).broadcast, device, writer)
    timeout = timedelta(seconds=call.timeout_s)
    address = f"[{call.master_address}]" if ":" in call.master_address else call.master_address
    url = f"tcp://{address}:{call.master_port}"
    store, rank, size = next(rendezvous(url, call.rank, call.world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = c10d._new_process_group_helper(
        size,
        rank,
        [],
        c10d.Backend(call.backend),
        c10d.PrefixStore(call.group_name, store),
        group_name=call.group_name,  # type: ignore[arg-type]  # newer versions of PyTorch give it a type of its own
        timeout=timeout,
    )
    assert isinstance(group, dist.ProcessGroup), "only a process outside the group has none"
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    return Group(partial(_broadcast, group), device, writer)


def _broadcast(group: dist.ProcessGroup, tensors: Iterable[torch.Tensor]) -> None:
    """Each is posted at once: it is received while the next one is made ready."""
    works = [dist.broadcast(tensor, group_src=0, group=group, async_op=True) for tensor in tensors]
    for work in works:
        if work is not None:
            work.wait()


def copy_from_gpu(call: CopyFromGpu, writer: FileWriter) -> None:
    """Copy tensors out of another process's GPU memory. The process keeps them until the call is answered."""
    opened: dict[str, torch.Tensor] = {}
    tensors = []
    sizes = _sizes(call.dtypes, call.shapes)
    for size, arguments, first_byte in zip(sizes, call.handles, call.first_bytes, strict=True):
        key = repr(arguments)
        if key not in opened:
            opened[key] = open_shared(arguments)
        flat = as_bytes(opened[key])
        tensors.append(flat if first_byte is None else flat[first_byte : first_byte + size])
    wait_for_kernels(tensors)
    _write_file(call, tensors, writer)


def _write_file(call: CopyFromGpu | ReceiveBucket, tensors: Sequence[torch.Tensor], writer: FileWriter) -> None:
    """The tensors of a bucket, or its bytes in one piece, as the safetensors file of the call."""
    header = build_header(zip(call.names, call.dtypes, call.shapes, strict=True))
    pieces, at = [], len(header)
    for tensor in tensors:
        pieces.append((as_bytes(tensor), at))
        at += pieces[-1][0].nbytes
    expected = len(header) + sum(_sizes(call.dtypes, call.shapes))
    if at != expected:
        raise ValueError(f"the tensors have {at - len(header)} bytes, {expected - len(header)} were announced")
    descriptor = os.open(call.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not writer.hold(Path(call.path), descriptor, header, pieces, spare_bytes=call.spare_bytes):
            writer.write(descriptor, header, pieces)
    finally:
        os.close(descriptor)


def _sizes(dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Bytes of each tensor."""
    return [math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in zip(dtypes, shapes, strict=True)]


def _piece_sizes(call: ReceiveBucket) -> list[int]:
    """Bytes of each piece of a flattened bucket: a piece ends with the tensor that takes it over `piece_bytes`."""
    pieces = [0]
    for num_bytes in _sizes(call.dtypes, call.shapes):
        if call.piece_bytes and pieces[-1] > call.piece_bytes:
            pieces.append(0)
        pieces[-1] += num_bytes
    return pieces


def _mapped_file(path: str, num_bytes: int) -> mmap.mmap:
    """A file of this size, mapped. Pages that it has already are used again. OSError if the file system is full."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        has_bytes = os.fstat(descriptor).st_size
        if has_bytes < num_bytes:  # a full file system is an error here, not a signal later
            os.posix_fallocate(descriptor, has_bytes, num_bytes - has_bytes)
        elif has_bytes > num_bytes:
            os.ftruncate(descriptor, num_bytes)
        memory = mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
    return memory


class _Bucket:
    """A safetensors file of given tensors, mapped. Without a path, the same in private memory."""

    def __init__(
        self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]], *, path: str
    ) -> None:
        header = build_header(zip(names, dtypes, shapes, strict=True))
        self._dtypes, self._shapes = dtypes, shapes
        self._start = len(header)
        self._num_bytes = sum(_sizes(dtypes, shapes))
        total = len(header) + self._num_bytes
        if path:
            self._memory = _mapped_file(path, total)
        else:
            self._memory = mmap.mmap(-1, total)
        self._memory[: len(header)] = header

    def pieces(self, sizes: Sequence[int]) -> Iterator[torch.Tensor]:
        """All tensors as bytes, in pieces of these sizes."""
        at = self._start
        for num_bytes in sizes:
            self._map_pages(at, num_bytes)
            yield self._bytes(at, num_bytes)
            at += num_bytes

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors in their places in the file. ValueError before the first one if a place does not fit a number.

        The pages of one are mapped while the one before it is received.
        """
        sizes = _sizes(self._dtypes, self._shapes)
        places = list(accumulate(sizes, initial=self._start))
        kinds = list(zip(self._dtypes, self._shapes, places, sizes, strict=False))
        if any(num_bytes and at % ITEM_BYTES[dtype] for dtype, _, at, num_bytes in kinds):
            raise ValueError("tensors of larger numbers must come before those of smaller ones in a bucket")
        for dtype, shape, at, num_bytes in kinds:
            self._map_pages(at, num_bytes)
            yield self._bytes(at, num_bytes).view(_DTYPES[dtype]).reshape(shape)

    def _bytes(self, at: int, num_bytes: int) -> torch.Tensor:
        if not num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._memory, dtype=torch.uint8, offset=at, count=num_bytes)

    def _map_pages(self, at: int, num_bytes: int) -> None:
        first = at // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(OSError):  # kernels before 5.14
            self._memory.madvise(_POPULATE_READ, first, at + num_bytes - first)
