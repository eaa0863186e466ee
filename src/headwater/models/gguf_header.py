"""Parses the header of a GGUF file: metadata and the list of tensors. No torch, no `gguf` package.

The `gguf` package's reader makes numpy objects of every string of the vocabulary, which takes seconds. Here long arrays
are skipped, and read on demand. Every count and length is checked against the file before anything is allocated.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from headwater.models.model_files import ModelFileError, open_regular, read_into

if TYPE_CHECKING:
    import numpy as np

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_U64 = struct.Struct("<Q")
_DEFAULT_ALIGNMENT = 32
_LONGEST_EAGER_ARRAY = 1024
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

# far beyond any model: a larger number is damage, and must not be iterated over
_MOST_ENTRIES, _MOST_TENSORS, _MOST_ITEMS = 1 << 16, 1 << 20, 1 << 24
_MOST_STRING_BYTES, _MOST_DIMS, _DEEPEST_ARRAY = 1 << 26, 4, 4


class TensorInfo(NamedTuple):
    """A tensor's entry in the header: shape outermost first, GGML's number of its type, bytes from the start."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class GGUFHeader:
    """A GGUF file and its parsed header.

    `metadata` holds strings, numbers and short arrays of numbers; other arrays are read by `array`, unless
    `with_arrays` puts them into `metadata` as well. ModelFileError for a file that is no complete little-endian GGUF of
    version 2 or 3.
    """

    def __init__(self, path: Path, *, with_arrays: bool = False) -> None:
        self.path = path
        self._with_arrays = with_arrays
        self._file = open_regular(path)  # stays open, so that a file that replaces it is not mixed in
        weakref.finalize(self, self._file.close)
        if self._file.read(4) != b"GGUF":
            raise ModelFileError(path, "is no GGUF file: it does not begin with 'GGUF'")
        self.data = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)  # the header; tensors are read by `read`
        self._at = 4
        self.metadata: dict[str, Any] = {}
        self._positions: dict[str, int] = {}  # of arrays that were skipped
        self._lengths: dict[str, int] = {}
        try:
            self._parse()
        except (struct.error, EOFError):
            raise self.refuse("is a truncated or damaged GGUF file") from None

    @property
    def array_keys(self) -> tuple[str, ...]:
        """Keys of the arrays that `metadata` leaves out."""
        return tuple(self._positions)

    def read(self, offset: int, num_bytes: int) -> "np.ndarray":
        """Bytes of the file, uint8[num_bytes]. Other Python threads run meanwhile."""
        from headwater.devices.own_memory import empty  # of the engine: tokenizers read headers alone

        buffer = empty((num_bytes,), "uint8")
        read_into(self._file, self.path, buffer.data, offset=offset)
        return buffer

    def array(self, key: str) -> list[Any]:
        """All items of the array under `key`. ModelFileError if there is none."""
        if key in self._positions:
            self._at = self._positions[key]
            return self._array(depth=0)
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise self.refuse(f"lacks the array {key!r}" if value is None else f"{key} is not an array")
        return value

    def array_length(self, key: str) -> int:
        return self._lengths[key] if key in self._lengths else len(self.array(key))

    def refuse(self, reason: str) -> ModelFileError:
        return ModelFileError(self.path, reason)

    def _parse(self) -> None:
        version = self._scalar("I")
        if version not in (2, 3):
            raise self.refuse(f"is GGUF version {version}, known versions: 2, 3 (little-endian)")
        num_tensors = self._count("tensors", _MOST_TENSORS)
        num_entries = self._count("entries of metadata", _MOST_ENTRIES)
        for _ in range(num_entries):
            key = self._string()
            if key in self.metadata or key in self._positions:
                raise self.refuse(f"holds {key!r} twice")
            self._read_entry(key, self._scalar("I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self.refuse(f"general.alignment must be a power of two from 1 to {1 << 20}, found {alignment!r}")
        start = -(-self._at // alignment) * alignment
        for info in infos:
            if info.offset % alignment:
                raise self.refuse(f"is damaged: tensor {info.name!r} is not aligned to {alignment} bytes")
        self.tensors = tuple(info._replace(offset=start + info.offset) for info in infos)

    def _read_entry(self, key: str, kind: int) -> None:
        if kind != _ARRAY:
            self.metadata[key] = self._value(kind, depth=0)
            return
        if self._with_arrays:
            self.metadata[key] = self._array(depth=0)
            return
        begin = self._at
        item_type, count = self._scalar("I"), self._count(f"items of {key}", _MOST_ITEMS)
        if item_type in _SCALARS and count <= _LONGEST_EAGER_ARRAY:
            self.metadata[key] = list(self._scalars(_SCALARS[item_type], count))
            return
        self._positions[key], self._lengths[key] = begin, count
        if item_type == _STRING:
            self._each_string(count, lambda start, end: None)
        elif item_type in _SCALARS:
            self._skip(count * struct.calcsize("<" + _SCALARS[item_type]))
        else:
            for _ in range(count):
                self._value(item_type, depth=1)

    def _tensor_info(self) -> TensorInfo:
        name = self._string()
        num_dims = self._scalar("I")
        if num_dims > _MOST_DIMS:
            raise self.refuse(f"is damaged: tensor {name!r} has {num_dims} dimensions, at most {_MOST_DIMS} are known")
        shape = self._scalars("Q", num_dims)[::-1]
        return TensorInfo(name, shape, kind=self._scalar("I"), offset=self._scalar("Q"))

    def _value(self, kind: int, *, depth: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and depth < _DEEPEST_ARRAY:
            return self._array(depth=depth)
        raise self.refuse(f"is damaged: it holds a value of unknown GGUF type {kind}")

    def _array(self, *, depth: int) -> list[Any]:
        item_type, count = self._scalar("I"), self._count("items of an array", _MOST_ITEMS)
        if item_type in _SCALARS:
            return list(self._scalars(_SCALARS[item_type], count))
        if item_type == _STRING:
            return self._strings(count)
        return [self._value(item_type, depth=depth + 1) for _ in range(count)]

    def _scalar(self, code: str) -> Any:
        return self._scalars(code, 1)[0]

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        begin = self._at
        self._skip(count * struct.calcsize("<" + code))  # before a format of `count` values is made
        return struct.unpack_from(f"<{count}{code}", self.data, begin)

    def _skip(self, num_bytes: int) -> None:
        self._at += num_bytes
        if self._at > len(self.data):
            raise EOFError

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        data = self.data
        return self._each_string(count, lambda start, end: data[start:end].decode("utf-8", errors="replace"))

    def _each_string(self, count: int, take: Callable[[int, int], Any]) -> list[Any]:
        # The hot loop, some 100,000 strings a file: everything is a local name.
        data, size, at, length_at = self.data, len(self.data), self._at, _U64.unpack_from
        taken = []
        for _ in range(count):
            (length,) = length_at(data, at)
            start = at + 8
            at = start + length
            if at > size:
                raise EOFError
            if length > _MOST_STRING_BYTES:
                raise self.refuse(f"is damaged: a string of {length} bytes, at most {_MOST_STRING_BYTES} are read")
            taken.append(take(start, at))
        self._at = at
        return taken

    def _count(self, what: str, most: int) -> int:
        count = self._scalar("Q")
        if count > most:
            raise self.refuse(f"is damaged: it announces {count} {what}, at most {most} are read")
        return count


def parts_of(path: Path) -> tuple[Path, ...]:
    """All files of a split GGUF (`NAME-00001-of-00003.gguf`), whichever of them `path` is; a whole file's own path.

    The first one holds the metadata.
    """
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, number, count = match[1], int(match[2]), int(match[3])
    if not 1 <= number <= count:
        raise ModelFileError(path, f"is named as part {number} of {count}")
    return tuple(path.with_name(f"{stem}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1))
