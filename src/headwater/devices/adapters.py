"""LoRA adapters as devices compute them (https://arxiv.org/abs/2106.09685): y += scale * (x A^T) B^T.

An adapter in memory has a slot, and slot 0 is none. A step has the slot of each of its tokens, so one step computes
rows of any adapters. A *site* is a place of a layer where products share their input: their A are one matrix.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from headwater.devices.device import Array, GatedLinear
from headwater.devices.host_tensor import HostTensor

NO_ADAPTER = 0  # the slot of rows without one
SITES: Mapping[str, tuple[str, ...]] = {  # the projections of each site, in the order of the fused outputs
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


@dataclass(frozen=True, slots=True, eq=False)
class AdapterMatrices:
    """Of one projection: A [rank, in] and B [out, rank], in the format that they are served in."""

    a: HostTensor
    b: HostTensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The matrices of an adapter by layer and projection ("q", "down"). `adapter_id` is a hash of all of them."""

    adapter_id: str
    matrices: Mapping[tuple[int, str], AdapterMatrices]

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max(each.rank for each in self.matrices.values())

    @property
    def num_bytes(self) -> int:
        return sum(each.a.nbytes + each.b.nbytes for each in self.matrices.values())

    def at(self, layer: int, site: str) -> Iterator[tuple[int, AdapterMatrices]]:
        """The matrices at one site: (index of the projection at the site, matrices)."""
        for index, projection in enumerate(SITES[site]):
            found = self.matrices.get((layer, projection))
            if found is not None:
                yield index, found


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What memory for adapters is sized by: `sites` has the inputs and the outputs of each projection.

    A model whose layers are all of experts has no site in their MLPs.
    """

    num_layers: int
    num_slots: int  # slot 0 included
    max_rank: int
    sites: Mapping[str, tuple[int, tuple[int, ...]]]


class StepAdapters(Protocol):
    """The adapters of one step, which `DecoderModel.forward` applies."""

    def add(self, site: str, layer: int, x: Array, y: Array) -> None:
        """Add each row's adapter to the products of `x`. `y` is [T, outputs of the site], or the residual stream."""
        ...

    def gated(self, layer: int, linear: GatedLinear, x: Array) -> Array:
        """`linear(x)` with each row's adapter added to gate and up before they are multiplied."""
        ...


class AdapterMemory(Protocol):
    """The adapters that a device holds, by slot. A slot changes only while no row of a later step has it."""

    shape: AdapterShape

    def prepare(self, adapter: Adapter) -> Any:
        """Convert an adapter for this memory; in any thread."""
        ...

    def place(self, slot: int, prepared: Any) -> None:
        """Put what `prepare` returned in a slot (> 0), in place of what the slot held."""
        ...

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        ...

    @property
    def num_bytes(self) -> int:
        """Memory of all adapters."""
        ...


def random_adapter(shape: AdapterShape, *, rank: int, seed: int, form: str, scale: float = 1.0) -> Adapter:
    """Random matrices for every projection: for benchmarks and tests."""
    generator = np.random.Generator(np.random.SFC64(seed))
    matrices = {}
    for layer in range(shape.num_layers):
        for site, (num_in, outs) in shape.sites.items():
            for projection, num_out in zip(SITES[site], outs, strict=True):
                a, b = (
                    HostTensor.of(generator.standard_normal(size, dtype=np.float32) * np.float32(0.02)).astype(form)
                    for size in ((rank, num_in), (num_out, rank))
                )
                matrices[layer, projection] = AdapterMatrices(a, b, scale)
    return Adapter(f"random-{seed}-{rank}", matrices)
