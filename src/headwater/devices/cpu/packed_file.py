"""A file of packed weights, which engines map instead of packing them again.

    magic, length of the header, its BLAKE2b hash | header (JSON) | arrays, each at a multiple of 64 bytes

The header says what every array is. A file whose header, size or key does not fit is refused (DamagedFile). The arrays
themselves are not checked: reading them would cost what the file is there to save.
"""

import hashlib
import mmap
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.experts.packed import PackedExperts
from headwater.devices.cpu.kernel_library import KernelLibrary
from headwater.devices.cpu.packed_layers import PackedGatedLinear, PackedLinear, RowsForm
from headwater.devices.cpu.packed_weights import BLOCK_COLS, PackedWeights
from headwater.devices.device import Activation, Routing
from headwater.devices.host_tensor import STORAGE_TYPES, HostTensor

Layer = PackedLinear | PackedGatedLinear | PackedExperts
Parts = Mapping[str, HostTensor | Layer]  # of a model; a layer under the name of its first matrix

_MAGIC = b"HWPACK1\n"
_HASH_BYTES = 32
_FIXED_BYTES = len(_MAGIC) + 8 + _HASH_BYTES
_ALIGNMENT = 64  # bytes: a line of the cache
_LONGEST_HEADER = 1 << 26


class DamagedFile(Exception):
    """The file cannot be used."""


class _Tensor(msgspec.Struct, frozen=True):
    """Where an array lies, in bytes behind the header, and what it holds."""

    offset: int
    format: str  # of a HostTensor; uint8 for packed blocks
    shape: tuple[int, ...]


class _Packed(msgspec.Struct, frozen=True):
    format: str
    in_features: int
    out_features: int
    is_gated: bool
    blocks: _Tensor
    bias: _Tensor | None


class _Rows(msgspec.Struct, frozen=True):
    num_rows: int
    format: str
    bias: _Tensor | None


class _Layer(msgspec.Struct, frozen=True):
    rows: tuple[_Rows, ...]
    packed: tuple[_Packed, ...]


class _Header(msgspec.Struct, frozen=True):
    key: str
    weights_id: str
    num_bytes: int  # of the weights in their form
    total_bytes: int  # of the arrays
    tensors: dict[str, _Tensor]
    layers: dict[str, _Layer]


class _Arrays:
    """The arrays of a file, in the order of their offsets."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self.arrays: list[tuple[int, npt.NDArray]] = []

    def tensor(self, tensor: HostTensor) -> _Tensor:
        offset = self.total_bytes
        self.arrays.append((offset, np.ascontiguousarray(tensor.data)))
        self.total_bytes = _aligned(offset + tensor.nbytes)
        return _Tensor(offset, tensor.format, tensor.shape)

    def layer(self, layer: Layer) -> _Layer:
        rows = [
            _Rows(part.num_rows, part.format, None if part.bias is None else self.tensor(part.bias))
            for part in layer.rows
        ]
        return _Layer(tuple(rows), tuple(self._packed(packed) for packed in layer.packed))

    def _packed(self, packed: PackedWeights) -> _Packed:
        return _Packed(
            packed.format,
            packed.in_features,
            packed.out_features,
            packed.is_gated,
            blocks=self.tensor(HostTensor.of(packed.blocks)),
            bias=None if packed.bias is None else self.tensor(HostTensor.of(packed.bias)),
        )


def write_packed(file: IO[bytes], parts: Parts, *, key: str, weights_id: str, num_bytes: int) -> None:
    """Write the packed weights of a model. OSError if the disk is full."""
    arrays = _Arrays()
    tensors = {name: arrays.tensor(part) for name, part in parts.items() if isinstance(part, HostTensor)}
    layers = {name: arrays.layer(part) for name, part in parts.items() if not isinstance(part, HostTensor)}
    header = msgspec.json.encode(_Header(key, weights_id, num_bytes, arrays.total_bytes, tensors, layers))
    file.write(_MAGIC + len(header).to_bytes(8, "little") + _hash(header) + header)
    start = _aligned(_FIXED_BYTES + len(header))
    for offset, array in arrays.arrays:
        file.write(bytes(start + offset - file.tell()))
        file.write(array.reshape(-1).view(np.uint8).data)
    file.write(bytes(start + arrays.total_bytes - file.tell()))


class PackedFile:
    """The packed weights of a model, mapped: processes share the memory, and the system may drop and reread it."""

    def __init__(self, path: Path, *, key: str, library: KernelLibrary) -> None:
        """Raises DamagedFile if this is not a whole file for `key`, OSError if there is none."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            self._header, start = _read_header(file, key)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_WILLNEED)
        self._library = library
        self._data = memoryview(self._map)[start:]
        self.weights_id = self._header.weights_id
        self.num_bytes = self._header.num_bytes

    def load(self, name: str) -> HostTensor:
        """A tensor that is no part of a layer."""
        return self._tensor(self._header.tensors[name])

    def linear(self, names: Sequence[str], *, has_bias: bool = False, stays_plain: bool = False) -> PackedLinear:
        layer = self._header.layers[names[0]]
        return PackedLinear(self._library, [self._packed(it) for it in layer.packed], rows=self._rows(layer))

    def gated_linear(
        self, names: Sequence[str], *, has_bias: bool = False, activation: Activation = "silu"
    ) -> PackedGatedLinear:
        layer = self._header.layers[names[0]]
        (packed,) = layer.packed
        return PackedGatedLinear(
            self._library,
            self._packed(packed),
            rows=self._rows(layer),
            activation=activation,
            is_fused=len(names) == 1,
        )

    def experts(
        self,
        names: Sequence[Sequence[str]],
        routing: Routing,
        *,
        has_bias: bool = False,
        activation: Activation = "silu",
    ) -> PackedExperts:
        layer = self._header.layers[names[0][0]]
        packed = [self._packed(it) for it in layer.packed]
        return PackedExperts(self._library, packed, rows=self._rows(layer), routing=routing, activation=activation)

    def _rows(self, layer: _Layer) -> list[RowsForm]:
        return [
            RowsForm(rows.num_rows, rows.format, None if rows.bias is None else self._tensor(rows.bias))
            for rows in layer.rows
        ]

    def _packed(self, stored: _Packed) -> PackedWeights:
        bias = None if stored.bias is None else self._tensor(stored.bias).data.reshape(-1, BLOCK_COLS)
        return PackedWeights(
            stored.format,
            stored.in_features,
            stored.out_features,
            stored.is_gated,
            blocks=self._tensor(stored.blocks).data,
            bias=bias,
        )

    def _tensor(self, stored: _Tensor) -> HostTensor:
        dtype = STORAGE_TYPES[stored.format]
        count = int(np.prod(stored.shape, dtype=np.int64))
        data = np.frombuffer(self._data, dtype, count, stored.offset)
        return HostTensor(stored.format, stored.shape, data.reshape(stored.shape))


def _read_header(file: IO[bytes], key: str) -> tuple[_Header, int]:
    """The header, and where the arrays begin."""
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise DamagedFile("it is no file that this user alone can write")
    fixed = file.read(_FIXED_BYTES)
    num_bytes = int.from_bytes(fixed[len(_MAGIC) : len(_MAGIC) + 8], "little")
    if not fixed.startswith(_MAGIC) or len(fixed) < _FIXED_BYTES or num_bytes > _LONGEST_HEADER:
        raise DamagedFile("it does not begin as such a file does")
    encoded = file.read(num_bytes)
    if _hash(encoded) != fixed[-_HASH_BYTES:]:
        raise DamagedFile("its header is damaged")
    header = msgspec.json.decode(encoded, type=_Header)
    start = _aligned(_FIXED_BYTES + num_bytes)
    if header.key != key:
        raise DamagedFile("it was made for other weights")
    if status.st_size != start + header.total_bytes:
        raise DamagedFile(f"it has {status.st_size} bytes instead of {start + header.total_bytes}")
    return header, start


def packed_bytes(parts: Iterable[HostTensor | Layer]) -> int:
    """About the size of a file of these parts."""
    return sum(part.nbytes if isinstance(part, HostTensor) else sum(it.nbytes for it in part.packed) for part in parts)


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_HASH_BYTES).digest()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
