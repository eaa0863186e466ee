"""The adapters of a CPU by slot (devices.adapters.AdapterMemory), in the layout of the kernels.

A program's ops refer to tables of addresses, one for each site. A slot that changes is written there, so nothing is
recorded again.
"""

import ctypes
from dataclasses import dataclass

import numpy as np

from headwater.devices.adapters import SITES, Adapter, AdapterShape
from headwater.devices.cpu.kernel_library import KernelLibrary
from headwater.devices.cpu.packed_weights import FORMATS, PackedWeights, pack
from headwater.devices.host_tensor import HostTensor

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64

Place = tuple[int, str]  # layer, site


class AdapterInputs(ctypes.Structure):
    """`AdapterInputs` of kernels/linear/adapters.c: A of a slot at one site."""

    _fields_ = (("a", _POINTER), ("rank", _INT64))


class AdapterOutputs(ctypes.Structure):
    """`AdapterOutputs` of kernels/linear/adapters.c: B of a slot for one projection."""

    _fields_ = (("b", _POINTER), ("first", _INT64), ("rank", _INT64), ("scale", ctypes.c_double))


@dataclass(frozen=True, slots=True, eq=False)
class PackedOutputs:
    """B of one projection. Its inputs are `rank` columns of x A^T from `first` on."""

    packed: PackedWeights
    first: int
    rank: int
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class PackedSite:
    """What an adapter has at one site: A of all projections, and each one's B by its index."""

    a: PackedWeights
    outputs: dict[int, PackedOutputs]


@dataclass(frozen=True, slots=True, eq=False)
class PreparedAdapter:
    """An adapter in the form of this device; `sites` is empty without kernels."""

    adapter: Adapter
    sites: dict[Place, PackedSite]

    @property
    def num_bytes(self) -> int:
        if not self.sites:
            return self.adapter.num_bytes
        packed = [part for it in self.sites.values() for part in (it.a, *(o.packed for o in it.outputs.values()))]
        return sum(each.nbytes for each in packed)


class CpuAdapters:
    """Adapters in memory, and the tables that programs read."""

    def __init__(self, library: KernelLibrary | None, shape: AdapterShape, *, form: str) -> None:
        """`form`: the format of all matrices."""
        self.shape = shape
        self.format_id = FORMATS.index(form)
        self._library = library
        self._slots: list[PreparedAdapter | None] = [None] * shape.num_slots
        places = [(layer, site) for layer in range(shape.num_layers) for site in shape.sites]
        self.inputs = {place: (AdapterInputs * shape.num_slots)() for place in places}
        self.outputs = {place: (AdapterOutputs * (shape.num_slots * len(SITES[place[1]])))() for place in places}

    @property
    def library(self) -> KernelLibrary | None:
        return self._library

    def adapter(self, slot: int) -> Adapter | None:
        """The adapter of a slot; None: nothing is added."""
        found = self._slots[slot]
        return None if found is None else found.adapter

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        """Pack an adapter; in any thread."""
        if self._library is None:
            return PreparedAdapter(adapter, {})
        places = {(layer, site) for layer in range(self.shape.num_layers) for site in self.shape.sites}
        sites = {place: _pack_site(self._library, adapter, place) for place in sorted(places)}
        return PreparedAdapter(adapter, {place: site for place, site in sites.items() if site is not None})

    def place(self, slot: int, prepared: PreparedAdapter) -> None:
        self.clear(slot)
        self._slots[slot] = prepared
        for place, site in prepared.sites.items():
            self.inputs[place][slot] = AdapterInputs(site.a.blocks.ctypes.data, site.a.out_features)
            for index, out in site.outputs.items():
                entry = AdapterOutputs(out.packed.blocks.ctypes.data, out.first, out.rank, out.scale)
                self.outputs[place][slot * len(SITES[place[1]]) + index] = entry

    def clear(self, slot: int) -> None:
        self._slots[slot] = None
        for place, table in self.inputs.items():
            table[slot] = AdapterInputs()
            for index in range(len(SITES[place[1]])):
                self.outputs[place][slot * len(SITES[place[1]]) + index] = AdapterOutputs()

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self._slots if each is not None)


def _pack_site(library: KernelLibrary, adapter: Adapter, place: Place) -> PackedSite | None:
    matrices, outputs, first = [], {}, 0
    for index, each in adapter.at(*place):
        rank = each.rank + each.rank % 2  # bfloat16 is packed in pairs of inputs; zeros change no sum
        matrices.append(_padded(each.a, rows=rank, cols=each.a.shape[1]))
        b = pack(library, [_padded(each.b, rows=each.b.shape[0], cols=rank)])
        outputs[index] = PackedOutputs(b, first, rank, each.scale)
        first += rank
    return PackedSite(pack(library, matrices), outputs) if matrices else None


def _padded(matrix: HostTensor, *, rows: int, cols: int) -> HostTensor:
    if matrix.shape == (rows, cols):
        return matrix
    data = np.zeros((rows, cols), dtype=matrix.data.dtype)
    data[: matrix.shape[0], : matrix.shape[1]] = matrix.data
    return HostTensor(matrix.format, (rows, cols), data)
