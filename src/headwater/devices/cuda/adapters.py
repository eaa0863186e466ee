"""LoRA adapters on a GPU (devices.adapters): one buffer of all slots for each site, at addresses that stay."""

import math
from typing import Any

import torch

from headwater.devices.adapters import Adapter, AdapterShape
from headwater.devices.cuda.kernels.lora import BLOCK_OUTPUTS, RANKS, SiteMatrices, expand, expand_gated, shrink
from headwater.devices.cuda.kernels.row_tiles import plan_tiles
from headwater.devices.cuda.products.gated_linear import CudaGatedLinear
from headwater.devices.cuda.torch_tensors import from_host, torch_dtype

_ALIGNED = 16  # numbers: what one load of a kernel takes
Place = tuple[int, str]  # layer, site
Prepared = dict[Place, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]  # A, B, scales, ranks: of a slot


class CudaAdapters:
    """The adapters of all slots. A larger rank than an adapter has is filled up with zeros."""

    def __init__(self, shape: AdapterShape, *, form: str, device: torch.device) -> None:
        """`form`: the dtype of all matrices."""
        self.shape = shape
        self._device = device
        self._dtype = torch_dtype(form)
        self._rank = max(RANKS, 1 << (shape.max_rank - 1).bit_length())  # the kernels take powers of two
        places = ((layer, site) for layer in range(shape.num_layers) for site in shape.sites)
        self.sites = {place: self._empty(place[1], shape.num_slots) for place in places}

    def prepare(self, adapter: Adapter) -> Prepared:
        found: Prepared = {}
        for place in self.sites:
            each = self._empty(place[1], 1, device=torch.device("cpu"))
            firsts = _firsts(self.shape.sites[place[1]][1])
            for index, matrices in adapter.at(*place):
                a, b = from_host(matrices.a), from_host(matrices.b)
                each.a[0, index, : len(a)] = a
                each.b[0, firsts[index] : firsts[index] + len(b), : b.shape[1]] = b
                each.scales[0, index] = matrices.scale
                each.ranks[0, index] = matrices.rank
            parts = (each.a, each.b, each.scales, each.ranks)
            a, b, scales, ranks = (part[0].to(self._device) for part in parts)
            found[place] = (a, b, scales, ranks)
        return found

    def place(self, slot: int, prepared: Prepared) -> None:
        for place, (a, b, scales, ranks) in prepared.items():
            site = self.sites[place]
            site.a[slot].copy_(a)
            site.b[slot].copy_(b)
            site.scales[slot].copy_(scales)
            site.ranks[slot].copy_(ranks)

    def clear(self, slot: int) -> None:
        """Nothing to do: no row has the slot before it is filled again."""

    @property
    def num_bytes(self) -> int:
        return sum(it.a.nbytes + it.b.nbytes for it in self.sites.values())

    def of_step(self, slots: torch.Tensor) -> "CudaStepAdapters":
        """The adapters of a step whose tokens have these slots, int32[T]."""
        return CudaStepAdapters(self.sites, slots, num_slots=self.shape.num_slots)

    def _empty(self, site: str, num_slots: int, *, device: torch.device | None = None) -> SiteMatrices:
        num_in, sizes = self.shape.sites[site]
        device = self._device if device is None else device
        blocks = [
            (index, start, first + size)
            for index, (first, size) in enumerate(zip(_firsts(sizes), sizes, strict=True))
            for start in range(first, first + size, BLOCK_OUTPUTS)
        ]
        return SiteMatrices(
            a=torch.zeros((num_slots, len(sizes), self._rank, num_in), dtype=self._dtype, device=device),
            b=torch.zeros((num_slots, sum(sizes), self._rank), dtype=self._dtype, device=device),
            scales=torch.zeros((num_slots, len(sizes)), dtype=torch.float32, device=device),
            ranks=torch.zeros((num_slots, len(sizes)), dtype=torch.int32, device=device),
            blocks=torch.tensor(blocks, dtype=torch.int32, device=device),
            multiple=math.gcd(_ALIGNED, *sizes),
        )


class CudaStepAdapters:
    """The adapters of one step (devices.adapters.StepAdapters).

    All kernels are in one stream: a CUDA graph with branches takes longer to launch.
    """

    def __init__(self, sites: dict[Place, SiteMatrices], slots: torch.Tensor, *, num_slots: int) -> None:
        self._sites = sites
        self._tiles = plan_tiles(slots, num_slots=num_slots, covers_all=True)

    def add(self, site: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        at = self._sites[layer, site]
        expand(shrink(x, self._tiles, at), y, self._tiles, at)

    def gated(self, layer: int, linear: Any, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(linear, CudaGatedLinear)
        at = self._sites[layer, "gate_up"]
        s, halves = shrink(x, self._tiles, at), linear.halves(x)
        return expand_gated(s, halves, self._tiles, at, activation=linear.activation)


def adapter_bytes(shape: AdapterShape, *, form: str) -> int:
    """Memory that CudaAdapters take."""
    rank = max(RANKS, 1 << (shape.max_rank - 1).bit_length())
    numbers = sum(len(sizes) * num_in + sum(sizes) for num_in, sizes in shape.sites.values())
    return shape.num_layers * shape.num_slots * rank * numbers * torch_dtype(form).itemsize


def _firsts(sizes: tuple[int, ...]) -> list[int]:
    """Where the outputs of each projection begin."""
    return [sum(sizes[:index]) for index in range(len(sizes))]
