"""The calls of NCCL's C library that vLLM's communicator needs, by ctypes.

PyTorch has the library in memory, and its own way to these calls (torch.cuda.nccl.init_rank) fails on Python 3.10 and
later: "PY_SSIZE_T_CLEAN macro must be defined".
"""

import ctypes
from typing import Any

import torch

_NAME = "libnccl.so.2"
_ID_BYTES = 128
_SUM, _BYTES, _FLOAT32 = 0, 1, 7  # as nccl.h numbers operations and types
_TYPES = {
    torch.int8: 0, torch.uint8: _BYTES, torch.int32: 2, torch.int64: 4, torch.float16: 6, torch.float32: _FLOAT32,
    torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip


class UniqueId(ctypes.Structure):
    """By which the ranks of a communicator find each other. C functions take it by value."""

    _fields_ = (("internal", ctypes.c_byte * _ID_BYTES),)


_ARGUMENTS: dict[str, list[Any]] = {
    "ncclGetUniqueId": [ctypes.POINTER(UniqueId)],
    "ncclCommInitRank": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int, UniqueId, ctypes.c_int],
    "ncclAllReduce": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
    ],
    "ncclBroadcast": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
    ],
}  # fmt: skip


class NcclLibrary:
    """NCCL's functions. Those that fail raise RuntimeError with NCCL's words."""

    def __init__(self, library: Any = None) -> None:
        """`library`: has the C functions; None: what PyTorch uses. RuntimeError if it is not there."""
        if library is None:
            try:
                library = ctypes.CDLL(_NAME)
            except OSError as error:
                raise RuntimeError(f"NCCL's library was not found: {error}") from None
        self._functions: dict[str, Any] = {}
        for name, arguments in _ARGUMENTS.items():
            self._functions[name] = getattr(library, name)
            self._functions[name].argtypes, self._functions[name].restype = arguments, ctypes.c_int
        self._words = library.ncclGetErrorString
        self._words.argtypes, self._words.restype = [ctypes.c_int], ctypes.c_char_p

    def unique_id(self) -> bytes:
        """A new one, for rank 0."""
        found = UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(found))
        return bytes(found)

    def call(self, name: str, *arguments: Any) -> None:
        status = self._functions[name](*arguments)
        if status:
            raise RuntimeError(f"{name}: {self._words(status).decode(errors='replace')} (NCCL's error {status})")


class NcclCommunicator:
    """A rank of a communicator, on the current GPU. Calls are enqueued in the current stream."""

    def __init__(self, library: NcclLibrary, *, size: int, unique_id: bytes, rank: int) -> None:
        """Returns when all ranks are there and have added up one number, as vLLM's do before anything else."""
        self._library = library
        self._pointer = ctypes.c_void_p()
        number = torch.zeros(1, device="cuda")
        by = UniqueId.from_buffer_copy(unique_id)
        library.call("ncclCommInitRank", ctypes.byref(self._pointer), size, by, rank)
        at, stream = number.data_ptr(), torch.cuda.current_stream()
        library.call("ncclAllReduce", at, at, 1, _FLOAT32, _SUM, self._pointer, stream.cuda_stream)
        stream.synchronize()

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Of rank 0, to the others. The tensor is contiguous; its memory must stay until the stream got there."""
        kind, count = _TYPES.get(tensor.dtype, _BYTES), tensor.numel()
        count = count if tensor.dtype in _TYPES else tensor.nbytes
        at, stream = tensor.data_ptr(), torch.cuda.current_stream()
        self._library.call("ncclBroadcast", at, at, count, kind, 0, self._pointer, stream.cuda_stream)
