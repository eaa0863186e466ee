"""Read the key-value metadata of a GGUF file, and nothing after it.

The `gguf` package's reader makes an object per array entry and walks the tensor table, which takes seconds
for a vocabulary of 49,000 tokens and its merges; this one takes tens of milliseconds, so the API process can
have its tokenizer ready before the engine has its weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path
from typing import Any

_MAGIC = b"GGUF"
_SUPPORTED_VERSIONS = (2, 3)

# value type -> struct format of one little-endian value
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All metadata of a GGUF file, by key; arrays as lists, strings as str.

    Reads the head of the file only. ValueError if the file is no GGUF, is truncated, or has a version or byte
    order that nobody writes any more; OSError if it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{path}: not a GGUF file (it does not begin with the bytes 'GGUF')")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _MetadataParser(content).parse()
            except (struct.error, EOFError) as error:
                raise ValueError(f"{path}: the GGUF metadata is truncated or damaged ({error})") from error
            except _UnsupportedFormat as error:
                raise ValueError(f"{path}: {error}") from error


class _UnsupportedFormat(Exception):
    pass


class _MetadataParser:
    """A cursor over the mapped file."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._size = len(content)
        self._position = len(_MAGIC)

    def parse(self) -> dict[str, Any]:
        version = self._u32()
        if version not in _SUPPORTED_VERSIONS:
            raise _UnsupportedFormat(f"GGUF version {version} is not supported, only little-endian 2 and 3")
        self._u64()  # number of tensors
        num_entries = self._u64()
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self._string()
            metadata[key] = self._value(self._u32())
        return metadata

    def _value(self, value_type: int) -> Any:
        if value_type in _SCALARS:
            return self._scalars(_SCALARS[value_type], count=1)[0]
        if value_type == _STRING:
            return self._string()
        if value_type == _ARRAY:
            return self._array()
        raise _UnsupportedFormat(f"unknown GGUF value type {value_type}")

    def _array(self) -> list[Any]:
        item_type, count = self._u32(), self._u64()
        if item_type in _SCALARS:
            return list(self._scalars(_SCALARS[item_type], count=count))
        if item_type == _STRING:
            return self._strings(count)
        return [self._value(item_type) for _ in range(count)]

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        # Compared before a format of `count` values is made: a damaged count must not allocate.
        self._require(count * struct.calcsize("<" + code))
        values = struct.Struct(f"<{count}{code}")
        found = values.unpack_from(self._content, self._position)
        self._position += values.size
        return found

    def _strings(self, count: int) -> list[str]:
        # The hot loop: some 100,000 strings per file, so everything is a local name.
        content, size, position, length_at = self._content, self._size, self._position, _U64.unpack_from
        strings: list[str] = []
        for _ in range(count):
            (length,) = length_at(content, position)
            start = position + 8
            position = start + length
            if position > size:
                raise EOFError("a string ends after the end of the file")
            strings.append(content[start:position].decode("utf-8", errors="replace"))
        self._position = position
        return strings

    def _string(self) -> str:
        return self._strings(1)[0]

    def _u32(self) -> int:
        (value,) = _U32.unpack_from(self._content, self._position)
        self._position += _U32.size
        return value

    def _u64(self) -> int:
        (value,) = _U64.unpack_from(self._content, self._position)
        self._position += _U64.size
        return value

    def _require(self, num_bytes: int) -> None:
        if self._position + num_bytes > self._size:
            raise EOFError("an array ends after the end of the file")
