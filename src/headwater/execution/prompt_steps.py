"""Forward passes of steps with prompt chunks or drafts: by a CUDA graph if small, else kernel by kernel.

Python takes longer to launch a small step than the card takes to compute it: a prompt's few new tokens behind a cached
prefix, or beside decodes. Lengths, positions and pages are static inputs of a graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels.prefill import queries_per_tile
from headwater.devices.cuda.paged_batch import RotaryTables
from headwater.devices.device import AttentionGeometry
from headwater.execution.device_slots import DeviceSlots
from headwater.execution.staging import ALIGNMENT, Ints, StagingRing
from headwater.execution.step_graphs import GraphPool, StepGraphs, next_size
from headwater.execution.step_inputs import (
    MixedArrays,
    MixedInputs,
    MixedShape,
    flatten,
    idle,
    pad,
    split_external,
    stage,
)
from headwater.scheduling.plan import StepPlan

# Parameters times tokens that the card computes while Python launches a step: 7 ms for 8B parameters and 256 tokens,
# measured on an H200. In larger steps, the launches hide behind the card's work.
_LAUNCH_BOUND = 2.5e12
_SLOW_LAUNCH_BOUND = 5e12  # float8: the library chooses a kernel for each launch; ranks: they launch sums as well
_MAX_TOKENS = 1024
_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, _MAX_TOKENS)
_TOKENS_BESIDE_DECODES = (32, 128, 512)
_DECODES = (8, 32, 64, 128, 256)
_SPARE_TILES = 8  # for chunks that leave their last tile half empty
_SPARE_JOINS = 4
_MANY_CHUNKS = 32  # as many requests as have drafts in one step
_TOKENS_OF_DRAFTS = (4, 8)  # below the smallest of other steps


def launch_bound_tokens(num_parameters: int, *, is_coded: bool = False, num_ranks: int = 1) -> int:
    """Tokens of a step up to which a graph is faster, for a model whose weights are as large as so many plain ones.

    With ranks, those of one rank.
    """
    bound = _SLOW_LAUNCH_BOUND if is_coded or num_ranks > 1 else _LAUNCH_BOUND
    return min(_MAX_TOKENS, int(bound / num_parameters))


def prompt_graph_sizes(
    *, max_tokens: int, max_decodes: int, has_drafts: bool = False
) -> tuple[tuple[int, int], ...]:
    """(decodes, prompt tokens) of the steps to capture: at most `max_tokens` of both, at most `max_decodes`.

    `has_drafts`: also steps of a request or two with short drafts.
    """
    sizes = [(0, tokens) for tokens in (*(_TOKENS_OF_DRAFTS if has_drafts else ()), *_TOKENS)]
    if max_decodes:
        beside = sorted({min(decodes, max_decodes) for decodes in _DECODES})
        sizes += [(decodes, tokens) for decodes in beside for tokens in _TOKENS_BESIDE_DECODES]
    return tuple(size for size in sizes if sum(size) <= max_tokens)


@dataclass(frozen=True, slots=True)
class PromptStep:
    """A step with prompt chunks that has been enqueued."""

    hidden: torch.Tensor  # float32[tokens, hidden_size], valid until the next step
    shift: int  # tokens of padding between decodes and chunks
    last_tokens: torch.Tensor  # int32[number that sample], among the hidden states
    sampled_slots: torch.Tensor  # int32[number that sample]


class PromptSteps:
    """Stages and enqueues steps with prompt chunks.

    `forward` computes the hidden states of inputs on the device. `sizes` are the (decodes, prompt tokens) of steps that
    become graphs; `pool` is their memory.
    """

    def __init__(
        self,
        device: CudaDevice,
        forward: Callable[[MixedInputs], torch.Tensor],
        *,
        geometry: AttentionGeometry,
        dtype: torch.dtype,
        slots: DeviceSlots,
        rotary: RotaryTables,
        sizes: Sequence[tuple[int, int]],
        pool: GraphPool | None,
    ) -> None:
        self._forward = forward
        self._slots = slots
        self._rotary = rotary
        self._plan_tiles = partial(device.plan_tiles, geometry)
        self._num_own_chunks = partial(device.num_own_chunks, geometry, dtype)
        self._ring = StagingRing(device.torch_device, num_ints=1 << 17)
        self._shapes = {size: _shapes(*size, device, geometry) for size in sorted(sizes)}
        shapes = tuple(shape for of_size in self._shapes.values() for shape in of_size)
        self._decode_sizes = sorted({decodes for decodes, _ in self._shapes})
        self._static: dict[MixedShape, MixedInputs] = {}
        self._static_ring = StagingRing(
            device.torch_device, num_ints=_static_ints(shapes, max_running=slots.padding_slot)
        )
        self._graphs = StepGraphs(self._compute, self._stage_nothing, shapes=shapes, pool=pool)

    def launch(self, plan: StepPlan, sampled: Ints) -> PromptStep:
        """Enqueue the forward pass of a plan; `sampled`: the rows that sample."""
        arrays = flatten(plan, sampled, plan_tiles=self._plan_tiles)
        shape = self._shape_for(arrays)
        if shape is None:
            first = self._num_own_chunks(arrays.lens, arrays.contexts)
            arrays = split_external(arrays, first, plan_tiles=self._plan_tiles)
            inputs = stage(arrays, ring=self._ring, slots=self._slots, rotary=self._rotary)
            return PromptStep(self._forward(inputs), 0, inputs.last_tokens, inputs.sampled_slots)
        self._graphs.prepare(shape)
        padded = pad(arrays, shape, padding_slot=self._slots.padding_slot)
        inputs = stage(padded, ring=self._static_ring, slots=self._slots, rotary=self._rotary)
        self._static[shape] = inputs
        shift = shape.num_decodes - len(arrays.decode_slots)
        return PromptStep(self._graphs.run(shape), shift, inputs.last_tokens, inputs.sampled_slots)

    @property
    def num_missing(self) -> int:
        """Graphs that `capture_all` would capture now."""
        return self._graphs.num_missing

    def capture_all(self, captured: Callable[[], None] = lambda: None) -> None:
        """Capture all graphs now instead of on first use. `captured` is called after each."""
        self._graphs.capture_all("steps with prompts", captured)

    def clear(self) -> None:
        """Forget all graphs: weights or KV memory have moved."""
        self._graphs.clear()

    def _shape_for(self, arrays: MixedArrays) -> MixedShape | None:
        """The shape with the fewest decodes and then the fewest tokens that a step fits in."""
        num_decodes = next_size(self._decode_sizes, len(arrays.decode_slots))
        if num_decodes is None:
            return None
        num_tokens = next_size(
            [tokens for decodes, tokens in self._shapes if decodes == num_decodes], len(arrays.token_ids)
        )
        if num_tokens is None:
            return None
        return next((shape for shape in self._shapes[num_decodes, num_tokens] if arrays.fits(shape)), None)

    def _compute(self, shape: MixedShape) -> torch.Tensor:
        return self._forward(self._static[shape])

    def _stage_nothing(self, shape: MixedShape) -> None:
        nothing = idle(shape, padding_slot=self._slots.padding_slot)
        self._static[shape] = stage(nothing, ring=self._static_ring, slots=self._slots, rotary=self._rotary)


def _shapes(
    num_decodes: int, num_tokens: int, device: CudaDevice, geometry: AttentionGeometry
) -> tuple[MixedShape, ...]:
    """A shape for few chunks of short contexts, and one for many chunks, whose attention may be cut into pieces."""
    if device.is_deterministic:  # decodes are among the chunks: as many tiles as tokens, and nothing is cut
        return (MixedShape(num_decodes, num_tokens, num_tiles=num_tokens, num_joins=0),)
    num_full = -(-num_tokens // queries_per_tile(geometry))
    num_tiles = num_full + _SPARE_TILES
    whole = MixedShape(num_decodes, num_tokens, num_tiles=num_tiles, num_joins=0)
    max_pieces = device.max_pieces(geometry)
    return whole, replace(
        whole,
        num_tiles=max(max_pieces, num_tiles, min(num_tokens, _MANY_CHUNKS)),
        num_joins=max(num_full + _SPARE_JOINS, min(num_tokens, max_pieces // 2)),  # of more tiles none is cut
    )


def _static_ints(shapes: Sequence[MixedShape], *, max_running: int) -> int:
    """Integers of the largest shape's arrays in a ring, which must not move them."""
    sizes = [sum(array.size + ALIGNMENT for array in idle(shape, padding_slot=0).padded) for shape in shapes]
    return max(sizes, default=0) + 2 * (max_running + ALIGNMENT)
