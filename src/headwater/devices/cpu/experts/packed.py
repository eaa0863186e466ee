"""A layer of experts on a CPU with kernels (device.Experts): records the choice, the products and the weighted sum."""

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from headwater.devices.cpu.experts.jobs import ExpertInputsJob, ExpertsJob, GroupJob, RouteJob, SumExpertsJob
from headwater.devices.cpu.kernel_library import TOKENS, KernelLibrary
from headwater.devices.cpu.linear_kernels import Mode
from headwater.devices.cpu.packed_layers import RowsForm, in_format
from headwater.devices.cpu.packed_weights import (
    PackedWeights,
    empty_stack,
    pack_in_stack,
    part_of_stack,
    register_bytes,
    unpack,
    with_biases,
)
from headwater.devices.cpu.program import Array
from headwater.devices.device import ACTIVATIONS, Activation, ExpertBiases, Routing
from headwater.devices.host_tensor import HostTensor

_TILE_NUMBERS = 3  # of `ExpertTile`


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the rows of a step lie: arrays with a row of numbers for each token, and what `GroupJob` counts."""

    tokens: Array
    places: Array
    tiles: Array
    weights: Array
    num_tiles: np.ndarray


class PackedExperts:
    """Experts whose matrices lie in two stacks: gate and up of all experts, and down of all experts."""

    def __init__(
        self,
        library: KernelLibrary,
        packed: Sequence[PackedWeights],
        *,
        rows: Sequence[RowsForm],
        routing: Routing,
        activation: Activation = "silu",
    ) -> None:
        """`packed`: the two stacks. `rows`: gate, up and down of an expert before packing, and the biases of all."""
        self._library = library
        self.packed = packed
        self.rows = rows
        self.routing = routing
        self.activation: Activation = activation
        self.num_experts = len(packed[1].blocks) // len(part_of_stack(packed[1], 0).blocks)

    @classmethod
    def of(
        cls,
        library: KernelLibrary,
        experts: Iterable[tuple[HostTensor, HostTensor, HostTensor]],
        *,
        num_experts: int,
        routing: Routing,
        num_threads: int,
        biases: ExpertBiases | None = None,
        activation: Activation = "silu",
    ) -> "PackedExperts":
        """Pack experts as they come: a few of them are in memory beside the layer."""
        stacks: list[PackedWeights] = []
        rows: list[RowsForm] = []
        packing: deque[Future[None]] = deque()

        def pack(index: int, expert: tuple[HostTensor, HostTensor, HostTensor]) -> None:
            pack_in_stack(library, stacks[0], index, expert[:2])
            pack_in_stack(library, stacks[1], index, expert[2:])

        with ThreadPoolExecutor(num_threads) as pool:
            for index, expert in enumerate(experts):
                if not stacks:
                    stacks = [empty_stack(library, part, num_experts) for part in (expert[:2], expert[2:])]
                    rows = [RowsForm.of(weight, None) for weight in expert]
                packing.append(pool.submit(pack, index, expert))
                if len(packing) > num_threads:
                    packing.popleft().result()
            for left in packing:
                left.result()
        if biases is not None:
            rows = [replace(form, bias=_stacked(biases, which)) for which, form in enumerate(rows)]
            floats = [form.bias.to_float32() for form in rows if form.bias is not None]
            stacks = [with_biases(stacks[0], floats[:2]), with_biases(stacks[1], floats[2:])]
        return cls(library, stacks, rows=rows, routing=routing, activation=activation)

    def __call__(self, x: Array, logits: Array) -> Array:
        y = x.program.array(TOKENS, x.width)
        self._record(x, logits, y, Mode.STORE)
        return y

    def add_to(self, residual: Array, x: Array, logits: Array) -> None:
        self._record(x, logits, residual, Mode.ADD)

    def matrix(self, expert: int, which: int) -> HostTensor:
        stack, index = (self.packed[0], which) if which < 2 else (self.packed[1], 0)
        matrix = unpack(self._library, part_of_stack(stack, expert))[index]
        return in_format(HostTensor.of(matrix), self.rows[which].format)

    def bias(self, expert: int, which: int) -> HostTensor:
        all_of_them = self.rows[which].bias
        assert all_of_them is not None
        row = all_of_them.rows(expert, expert + 1)
        return HostTensor(row.format, row.shape[1:], row.data[0])

    def _record(self, x: Array, logits: Array, y: Array, mode: Mode) -> None:
        assert x.rows == TOKENS
        per_token = self.routing.per_token
        places = self._record_places(logits)
        gate_up, down = self.packed
        inner = self._product(gate_up, self._inputs(gate_up, x, places.tokens), places, Mode.GATED)
        out = self._product(down, self._inputs(down, inner, None), places, Mode.STORE)
        job = SumExpertsJob(size=y.width, per_token=per_token, mode=mode)
        arrays = {"x": out, "weights": places.weights, "places": places.places, "y": y}
        x.program.append("sum_experts", job, arrays)

    def _record_places(self, logits: Array) -> _Places:
        program, routing, num_experts = logits.program, self.routing, self.num_experts
        experts = program.array(TOKENS, routing.per_token, dtype=np.int32)
        weights = program.array(TOKENS, routing.per_token)
        route = RouteJob(num_experts=num_experts, per_token=routing.per_token, renormalises=routing.renormalises)
        program.append("route_experts", route, {"logits": logits, "experts": experts, "weights": weights})
        tokens, places = (program.array(TOKENS, routing.per_token, dtype=np.int32) for _ in range(2))
        tiles = program.array(TOKENS, routing.per_token * _TILE_NUMBERS, dtype=np.int32)
        counts = np.zeros(1 + num_experts, np.int64)  # the number of tiles, and what the kernel counts by
        group = GroupJob(
            num_tiles=counts.ctypes.data,
            ends=counts[1:].ctypes.data,
            num_experts=num_experts,
            per_token=routing.per_token,
        )
        arrays = {"experts": experts, "tokens": tokens, "places": places, "tiles": tiles}
        program.append("group_experts", group, arrays, keeps=(counts,))
        return _Places(tokens, places, tiles, weights, counts)

    def _inputs(self, packed: PackedWeights, x: Array, tokens: Array | None) -> Array:
        """Activations of the rows at all places; `tokens`: whose rows of x they are, None if x has them in place."""
        per_token, row_bytes = self.routing.per_token, register_bytes(self._library, packed.format, packed.in_features)
        if tokens is None and row_bytes == packed.in_features * x.dtype.itemsize:
            return x  # float32, as it is
        y = x.program.array(TOKENS, per_token * row_bytes, dtype=np.uint8)
        job = ExpertInputsJob(in_features=packed.in_features, format=packed.format_id, per_token=per_token)
        arrays = {"x": x, "y": y} if tokens is None else {"x": x, "y": y, "tokens": tokens}
        x.program.append("expert_inputs", job, arrays)
        return y

    def _product(self, packed: PackedWeights, x: Array, places: _Places, mode: Mode) -> Array:
        per_token = self.routing.per_token
        y = x.program.array(TOKENS, per_token * packed.out_features)
        job = ExpertsJob(
            weights=packed.blocks.ctypes.data,
            in_features=packed.in_features,
            out_features=packed.out_features,
            y_stride=packed.out_features,
            format=packed.format_id,
            mode=mode,
            rows=TOKENS,
            num_tiles=places.num_tiles.ctypes.data,
            activation=ACTIVATIONS.index(self.activation),
            bias=None if packed.bias is None else packed.bias.ctypes.data,
            expert_bytes=packed.nbytes // self.num_experts,
            expert_biases=0 if packed.bias is None else packed.bias.size // self.num_experts,
            per_token=per_token,
        )
        x.program.append("experts", job, {"x": x, "y": y, "tiles": places.tiles}, keeps=(packed, places.num_tiles))
        return y


def _stacked(biases: ExpertBiases, which: int) -> HostTensor:
    """The biases of one matrix of all experts, [experts, outputs]."""
    parts = [each[which] for each in biases]
    return HostTensor(parts[0].format, (len(parts), *parts[0].shape), np.stack([part.data for part in parts]))
