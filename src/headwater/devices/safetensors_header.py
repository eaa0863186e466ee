"""The header of a .safetensors file. The standard library alone: the API process reads headers as well.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

MAX_HEADER_BYTES = 100_000_000  # the limit of the format
LENGTH_BYTES = 8  # in front of the header
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class StoredTensor(NamedTuple):
    """A tensor's place in the file: `start` and `num_bytes`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def parse_header(text: bytes, *, size: int) -> dict[str, StoredTensor]:
    """The tensors of a file of `size` bytes whose header is `text`. ValueError unless they fill the file exactly."""
    data_start = LENGTH_BYTES + len(text)
    try:
        entries = json.loads(text.decode("utf-8"))
        if not isinstance(entries, dict):
            raise ValueError("its header is no JSON object")
        entries.pop("__metadata__", None)
        found = {name: _stored(name, entry, data_start=data_start, size=size) for name, entry in entries.items()}
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    _check_whole(found, data_start=data_start, size=size)
    return found


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Length and header of a file that holds (name, dtype, shape) one after the other."""
    entries, at = {}, 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _stored(name: str, entry: dict[str, Any], *, data_start: int, size: int) -> StoredTensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r} has a shape or place that is no number")
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
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
