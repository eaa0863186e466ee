"""Read the header of a GGUF file: its metadata and where its tensors lie. No torch, no weights.

The `gguf` package's own reader makes numpy objects of every string of the vocabulary, which takes seconds;
here arrays are read only when asked for. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is outermost first (GGUF itself writes innermost first)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    num_bytes: int


class GGUFFile:
    """A memory-mapped GGUF file.

    `metadata` holds strings, numbers and short arrays of numbers; longer arrays and arrays of strings are
    read by `array`. Raises ValueError for a file that is no little-endian GGUF of version 2 or 3.
    """

    _LONGEST_EAGER_ARRAY = 1024

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is no GGUF file: it does not begin with 'GGUF'")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 4
        try:
            self._read_header()
        except struct.error as error:
            raise ValueError(f"{path} is a truncated GGUF file") from error

    def array(self, key: str) -> list[Any]:
        """All items of the array under `key`."""
        if key in self._long_arrays:
            self._at, item_type, count = self._long_arrays[key]
            return [self._value(item_type) for _ in range(count)]
        value = self.metadata[key]
        assert isinstance(value, list), f"{key} is not an array"
        return value

    def array_length(self, key: str) -> int:
        return self._long_arrays[key][2] if key in self._long_arrays else len(self.metadata[key])

    def raw(self, tensor: GGUFTensor) -> np.ndarray:
        """The tensor's bytes as they are in the file, uint8[num_bytes], a read-only view of the mapping."""
        return np.frombuffer(self._data, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.offset)

    def _read_header(self) -> None:
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"{self.path} is GGUF version {version}, known versions: 2, 3 (little-endian)")
        num_tensors, num_entries = self._scalar("<Q"), self._scalar("<Q")
        self.metadata: dict[str, Any] = {}
        self._long_arrays: dict[str, tuple[int, int, int]] = {}  # key -> position, item type, count
        for _ in range(num_entries):
            key = self._string()
            self._read_entry(key, self._scalar("<I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: self._tensor(name, shape, kind, start + at) for name, shape, kind, at in infos}

    def _read_entry(self, key: str, kind: int) -> None:
        if kind != _ARRAY:
            self.metadata[key] = self._value(kind)
            return
        item_type, count = self._scalar("<I"), self._scalar("<Q")
        if item_type != _STRING and count <= self._LONGEST_EAGER_ARRAY:
            self.metadata[key] = [self._value(item_type) for _ in range(count)]
            return
        self._long_arrays[key] = (self._at, item_type, count)
        if item_type == _STRING:
            for _ in range(count):
                self._at += 8 + struct.unpack_from("<Q", self._data, self._at)[0]
        else:
            self._at += count * struct.calcsize(_SCALARS[item_type])

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._scalar("<I")
        shape = tuple(self._scalar("<Q") for _ in range(num_dims))[::-1]
        return name, shape, self._scalar("<I"), self._scalar("<Q")

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        tensor_type = GGMLQuantizationType(kind)
        block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
        num_bytes = int(np.prod(shape, dtype=np.int64)) // block_size * block_bytes
        if offset + num_bytes > len(self._data):
            raise ValueError(f"{self.path} is truncated: tensor {name!r} ends behind the end of the file")
        return GGUFTensor(name=name, shape=shape, type=tensor_type, offset=offset, num_bytes=num_bytes)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind not in _SCALARS:
            raise ValueError(f"{self.path} holds a value of unknown GGUF type {kind}")
        return self._scalar(_SCALARS[kind])

    def _scalar(self, form: str) -> Any:
        value = struct.unpack_from(form, self._data, self._at)[0]
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        text = self._data[self._at : self._at + length].decode("utf-8", errors="replace")
        self._at += length
        return text
