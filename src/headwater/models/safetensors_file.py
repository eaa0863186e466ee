"""One .safetensors file, read with plain reads.

The safetensors package maps the file. A page that a network mount does not deliver hangs the process with Python's lock
held; a page that another process has truncated kills it. Format:
https://github.com/huggingface/safetensors#format
"""

import os
import struct
import weakref
from pathlib import Path

import numpy as np

from headwater.devices.host_tensor import STORAGE_TYPES, HostTensor
from headwater.devices.own_memory import empty
from headwater.devices.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, StoredTensor, parse_header
from headwater.models.model_files import ModelFileError, open_regular, read_into

FORMATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class SafetensorsFile:
    """The tensors of one file. It stays open, so that a file that replaces it is not mixed in.

    ModelFileError for a file that is no complete regular .safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)
        weakref.finalize(self, self._file.close)
        self.tensors = self._read_header()

    def load(self, name: str, *, part: int | None = None) -> HostTensor:
        """A copy of one tensor, or of element `part` of its outermost dimension. Other Python threads run meanwhile."""
        stored, form = self.tensors[name], FORMATS[self.tensors[name].dtype]
        shape = stored.shape if part is None else stored.shape[1:]
        values = empty(shape, STORAGE_TYPES[form])
        bytes_of_it = values.reshape(-1).view(np.uint8).data
        offset = stored.start + (part or 0) * values.nbytes
        read_into(self._file, self.path, bytes_of_it, offset=offset, what=f"tensor {name!r} ")
        return HostTensor(form, shape, values)

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._file.fileno()).st_size
        head = bytearray(LENGTH_BYTES)
        self._read(memoryview(head), offset=0)
        (length,) = struct.unpack("<Q", head)
        if length > min(MAX_HEADER_BYTES, size - LENGTH_BYTES):
            raise self._damaged(f"its header would have {length} bytes")
        text = bytearray(length)
        self._read(memoryview(text), offset=LENGTH_BYTES)
        try:
            return parse_header(bytes(text), size=size)
        except ValueError as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from None

    def _read(self, buffer: memoryview, *, offset: int) -> None:
        read_into(self._file, self.path, buffer, offset=offset)

    def _damaged(self, reason: str) -> ModelFileError:
        return ModelFileError(self.path, f"is no whole safetensors file ({reason[:200]})")
