"""One .safetensors file, read with plain reads.

The safetensors package maps the file. A page that a network mount does not deliver hangs the process with Python's lock
held; a page that another process has truncated kills it. Format:
https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import struct
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headwater.devices.host_tensor import STORAGE_TYPES, HostTensor
from headwater.models.model_files import ModelFileError, open_regular, read_into

_MAX_HEADER_BYTES = 100_000_000  # the limit of the format
_FORMATS = {
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


class StoredTensor(NamedTuple):
    """A tensor's place in the file: `start` and `num_bytes`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class SafetensorsFile:
    """The tensors of one file. It stays open, so that a file that replaces it is not mixed in.

    ModelFileError for a file that is no complete regular .safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)
        weakref.finalize(self, self._file.close)
        self.tensors = self._read_header()

    def load(self, name: str) -> HostTensor:
        """A copy of one tensor. Other Python threads run while it is read."""
        stored, form = self.tensors[name], _FORMATS[self.tensors[name].dtype]
        values = np.empty(stored.shape, dtype=STORAGE_TYPES[form])
        self._read(values.reshape(-1).view(np.uint8).data, offset=stored.start)
        return HostTensor(form, stored.shape, values)

    def _read_header(self) -> dict[str, StoredTensor]:
        size = os.fstat(self._file.fileno()).st_size
        head = bytearray(8)
        self._read(memoryview(head), offset=0)
        (length,) = struct.unpack("<Q", head)
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise self._damaged(f"its header would have {length} bytes")
        text = bytearray(length)
        self._read(memoryview(text), offset=8)
        try:
            entries = json.loads(text.decode("utf-8"))
            if not isinstance(entries, dict):
                raise ValueError("its header is no JSON object")
            entries.pop("__metadata__", None)
            found = {name: _stored(name, entry, data_start=8 + length, size=size) for name, entry in entries.items()}
            _check_whole(found, data_start=8 + length, size=size)
            return found
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from None

    def _read(self, buffer: memoryview, *, offset: int) -> None:
        read_into(self._file, self.path, buffer, offset=offset)

    def _damaged(self, reason: str) -> ModelFileError:
        return ModelFileError(self.path, f"is no whole safetensors file ({reason[:200]})")


def _stored(name: str, entry: dict[str, Any], *, data_start: int, size: int) -> StoredTensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if dtype not in _FORMATS:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r} has a shape or place that is no number")
    if end - begin != math.prod(shape) * STORAGE_TYPES[_FORMATS[dtype]].itemsize:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} does not fill its {end - begin} bytes")
    if data_start + end > size:
        raise ValueError(f"tensor {name!r} ends behind the end of the file")
    return StoredTensor(dtype, shape, data_start + begin, end - begin)


def _check_whole(tensors: dict[str, StoredTensor], *, data_start: int, size: int) -> None:
    """Check that there are no gaps and no overlaps: a damaged offset would give another tensor's values."""
    at = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if stored.start != at:
            raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
        at += stored.num_bytes
    if at != size:
        raise ValueError(f"{size - at} bytes at its end belong to no tensor")
