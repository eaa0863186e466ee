"""A GGUF file, or all files of a split one: metadata, and where each tensor lies. No torch, no weights."""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from headwater.devices.host_tensor import STORAGE_TYPES, HostTensor
from headwater.models.fields import Fields
from headwater.models.gguf_header import GGUFHeader, TensorInfo, parts_of
from headwater.models.gguf_types import GGUF_TYPES, GGUFType
from headwater.models.model_files import ModelFileError, is_there


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is outermost first (GGUF itself writes innermost first)."""

    name: str
    shape: tuple[int, ...]
    type: GGUFType
    offset: int  # bytes from the start of its file
    num_bytes: int
    part: int = 0  # index of the file, of a split one


class GGUFFile:
    """GGUF: `path` may be a whole file, or any part of a split one.

    `metadata` holds strings, numbers and short arrays of numbers; longer arrays and arrays of strings are
    read by `array`. ModelFileError for a file that is no complete GGUF, and for a split file that lacks a part.
    """

    def __init__(self, path: Path) -> None:
        paths = parts_of(path)
        for part in paths:
            if len(paths) > 1 and not is_there(part):
                raise ModelFileError(path, f"is one of {len(paths)} parts, and {part.name} is not beside it")
        self._parts = [GGUFHeader(part) for part in paths]
        self._head = self._parts[0]
        self.path = self._head.path
        self.metadata = self._head.metadata
        self._check_split()
        self.tensors: dict[str, GGUFTensor] = {}
        for index, part in enumerate(self._parts):
            self._take_tensors(part, index)

    def array(self, key: str) -> list[Any]:
        """All items of the array under `key`. ModelFileError if there is none."""
        return self._head.array(key)

    @property
    def array_keys(self) -> tuple[str, ...]:
        """Keys of the arrays that `metadata` leaves out."""
        return self._head.array_keys

    def array_length(self, key: str) -> int:
        return self._head.array_length(key)

    def fields(self, *arrays: str) -> Fields:
        """The metadata with types and ranges checked, and the named arrays, which `metadata` leaves out."""
        found = {key: self.array(key) for key in arrays if key in self.array_keys}
        return Fields(self.metadata | found, source=str(self.path))

    def load(self, tensor: GGUFTensor) -> HostTensor:
        """A copy of one tensor, as it is in the file. ModelFileError for a type whose numbers are not read."""
        part = self._parts[tensor.part]
        form = tensor.type.form
        if not form:
            raise part.refuse(f"tensor {tensor.name!r} is of type {tensor.type.name}, which is not read")
        raw = part.read(tensor.offset, tensor.num_bytes)
        if form in STORAGE_TYPES:
            return HostTensor(form, tensor.shape, raw.view(STORAGE_TYPES[form]).reshape(tensor.shape))
        return HostTensor(form, tensor.shape, raw.reshape(*tensor.shape[:-1], -1))

    def _check_split(self) -> None:
        for index, part in enumerate(self._parts):
            fields = Fields(part.metadata, source=str(part.path))
            count = fields.integer("split.count", 0, low=0) or 1
            if count != len(self._parts):
                raise part.refuse(
                    f"is one of {count} parts by its metadata; all of them must lie beside it, named "
                    f"NAME-00001-of-{count:05d}.gguf and so on"
                )
            if count > 1 and fields.integer("split.no", low=0) != index:
                raise part.refuse(f"is part {part.metadata['split.no'] + 1} by its metadata, part {index + 1} by name")

    def _take_tensors(self, part: GGUFHeader, index: int) -> None:
        found = [_tensor(info, part, index) for info in part.tensors]
        for tensor in found:
            if tensor.name in self.tensors:
                raise part.refuse(f"holds tensor {tensor.name!r}, which is there already")
            self.tensors[tensor.name] = tensor
        for one, other in pairwise(sorted(found, key=lambda each: each.offset)):
            if one.offset + one.num_bytes > other.offset:
                raise part.refuse(f"is damaged: tensors {one.name!r} and {other.name!r} overlap")


def _tensor(info: TensorInfo, part: GGUFHeader, index: int) -> GGUFTensor:
    found = GGUF_TYPES.get(info.kind)
    if found is None:
        raise part.refuse(f"tensor {info.name!r} has the unknown type {info.kind}")
    if info.shape and info.shape[-1] % found.block_size:
        raise part.refuse(f"is damaged: rows of tensor {info.name!r} are no whole blocks of {found.block_size} values")
    num_bytes = math.prod(info.shape) // found.block_size * found.block_bytes
    if info.offset + num_bytes > len(part.data):
        raise part.refuse(f"is truncated: tensor {info.name!r} ends behind the end of the file")
    return GGUFTensor(info.name, info.shape, type=found, offset=info.offset, num_bytes=num_bytes, part=index)
