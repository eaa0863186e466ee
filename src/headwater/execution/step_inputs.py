"""A plan with prompt chunks or drafts in it, flattened into the integers that its kernels read."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from headwater.devices.cuda.paged_batch import Contexts, ExternalChunks, PagedBatch, PromptChunks, RotaryTables
from headwater.devices.cuda.prefill_tiles import PrefillTiles
from headwater.execution.device_slots import DeviceSlots
from headwater.execution.staging import Ints, StagingRing
from headwater.scheduling.plan import NEWEST_TOKEN, StepPlan

_IDLE_POSITION = -1  # at which kernels do nothing
_NONE = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class MixedShape:
    """The sizes that a step's arrays are padded to, so that similar steps share a graph."""

    num_decodes: int
    num_tokens: int  # of prompts
    num_tiles: int  # of prompts' attention; as many rows of chunks
    num_joins: int


@dataclass(frozen=True, slots=True)
class ExternalArrays:
    """The integers of ExternalChunks, on the host. The last two are empty if nothing is needed from pages."""

    starts: Ints  # [P + 1]
    slots: Ints  # [P]
    context_starts: Ints  # [P + 1]

    @property
    def arrays(self) -> tuple[Ints, Ints, Ints]:
        return self.starts, self.slots, self.context_starts


@dataclass(frozen=True, slots=True)
class MixedArrays:
    """The integers of a step, on the host: D decodes, then C chunks of N tokens in all. Fields as in PromptChunks.

    Drafts are chunks as well.
    """

    decode_slots: Ints  # [D]
    decode_positions: Ints  # [D]
    token_ids: Ints  # [N]
    token_slots: Ints  # [N]
    token_positions: Ints  # [N]
    slots: Ints  # [C]
    starts: Ints  # [C]
    lens: Ints  # [C]
    contexts: Ints  # [C]
    tiles: Ints  # [M, 5]
    joins: Ints  # [J, 4]
    last_tokens: Ints  # [number that sample], among the D + N
    sampled_slots: Ints  # [number that sample]
    external: ExternalArrays | None = None  # of the chunks that `tiles` leaves out

    @property
    def padded(self) -> tuple[Ints, ...]:
        """The arrays whose sizes a shape fixes."""
        return (
            self.decode_slots, self.decode_positions, self.token_ids, self.token_slots, self.token_positions,
            self.slots, self.starts, self.lens, self.contexts, self.tiles, self.joins,
        )  # fmt: skip

    def fits(self, shape: MixedShape) -> bool:
        """Whether `pad` can make the step one of this shape."""
        return (
            len(self.decode_slots) <= shape.num_decodes
            and len(self.token_ids) <= shape.num_tokens
            and max(len(self.tiles), len(self.slots)) <= shape.num_tiles
            and len(self.joins) <= shape.num_joins
        )


@dataclass(frozen=True, slots=True)
class MixedInputs:
    """The inputs of one forward pass, on the device."""

    token_ids: torch.Tensor  # int32[N]
    batch: PagedBatch
    last_tokens: torch.Tensor  # int32[number that sample], among the D + N
    sampled_slots: torch.Tensor  # int32[number that sample]


def flatten(plan: StepPlan, sampled: Ints, *, plan_tiles: Callable[[Ints, Ints], PrefillTiles]) -> MixedArrays:
    """The integers of a plan; `sampled` are the rows that sample.

    A request's newest token and its draft are one chunk, which reads its context once. These chunks lie between the
    decodes and the prompts.
    """
    assert plan.num_rows and (plan.num_tokens > 0).all(), "a plan computes at least one token in every row"
    is_drafted = plan.is_drafted
    assert (plan.token_ids[: plan.num_decodes][is_drafted] != NEWEST_TOKEN).all(), "a draft names its tokens"
    decodes, drafted = np.flatnonzero(~is_drafted), np.flatnonzero(is_drafted)
    order = np.concatenate((decodes, drafted, np.arange(plan.num_decodes, plan.num_rows)))
    slots, num_tokens, num_computed = plan.slots[order], plan.num_tokens[order], plan.num_computed[order]
    ends = np.cumsum(num_tokens, dtype=np.int32)
    starts = ends - num_tokens
    rows = np.repeat(np.arange(plan.num_rows), num_tokens)
    positions = np.arange(len(rows), dtype=np.int32) - starts[rows] + num_computed[rows]
    first = len(decodes)  # of rows, and of tokens as well: what follows is chunks
    chunks = first + _first_of_runs(slots[first:])
    lens = np.diff(np.append(starts[chunks], ends[-1:])).astype(np.int32)
    contexts = num_computed[chunks] + lens
    tiles = plan_tiles(lens, contexts)
    last_tokens = np.empty(plan.num_rows, dtype=np.int32)
    last_tokens[order] = ends - 1
    return MixedArrays(
        decode_slots=slots[:first],
        decode_positions=positions[:first],
        token_ids=np.concatenate((plan.token_ids[drafted], plan.token_ids[plan.num_decodes :])),
        token_slots=slots[rows[first:]],
        token_positions=positions[first:],
        slots=slots[chunks],
        starts=starts[chunks],
        lens=lens,
        contexts=contexts,
        tiles=tiles.tiles,
        joins=tiles.joins,
        last_tokens=last_tokens[sampled],
        sampled_slots=plan.slots[sampled],
    )


def _first_of_runs(slots: Ints) -> npt.NDArray[np.intp]:
    """The first row of each slot; rows of one slot follow each other."""
    return np.flatnonzero(np.append(True, slots[1:] != slots[:-1])) if len(slots) else np.empty(0, dtype=np.intp)


def split_external(arrays: MixedArrays, first: int, *, plan_tiles: Callable[[Ints, Ints], PrefillTiles]) -> MixedArrays:
    """The same step with the chunks from `first` on left to the external backend."""
    lens, contexts = arrays.lens[first:], arrays.contexts[first:]
    if not len(lens):
        return arrays
    tiles = plan_tiles(arrays.lens[:first], arrays.contexts[:first])
    needs_pages = (lens < contexts).any()
    external = ExternalArrays(
        starts=_starts(lens),
        slots=arrays.slots[first:] if needs_pages else _NONE,
        context_starts=_starts(contexts) if needs_pages else _NONE,
    )
    return replace(arrays, tiles=tiles.tiles, joins=tiles.joins, external=external)


def pad(arrays: MixedArrays, shape: MixedShape, *, padding_slot: int) -> MixedArrays:
    """The same step, padded with decodes, tokens and tiles that do nothing. It must fit."""
    num_decodes = len(arrays.decode_slots)
    shift = shape.num_decodes - num_decodes  # of all that comes behind the decodes
    num_rows = shape.num_tiles
    return MixedArrays(
        decode_slots=_filled(arrays.decode_slots, shape.num_decodes, padding_slot),
        decode_positions=_filled(arrays.decode_positions, shape.num_decodes, _IDLE_POSITION),
        token_ids=_filled(arrays.token_ids, shape.num_tokens, 0),
        token_slots=_filled(arrays.token_slots, shape.num_tokens, padding_slot),
        token_positions=_filled(arrays.token_positions, shape.num_tokens, _IDLE_POSITION),
        slots=_filled(arrays.slots, num_rows, padding_slot),
        starts=_filled(arrays.starts + shift, num_rows, 0),
        lens=_filled(arrays.lens, num_rows, 0),
        contexts=_filled(arrays.contexts, num_rows, 0),
        tiles=_filled(arrays.tiles, shape.num_tiles, 0),
        joins=_filled(arrays.joins, shape.num_joins, 0),
        last_tokens=arrays.last_tokens + np.where(arrays.last_tokens < num_decodes, 0, shift).astype(np.int32),
        sampled_slots=arrays.sampled_slots,
    )


def idle(shape: MixedShape, *, padding_slot: int) -> MixedArrays:
    """A step of this shape that does nothing."""
    none = np.empty(0, dtype=np.int32)
    empty = MixedArrays(
        decode_slots=none,
        decode_positions=none,
        token_ids=none,
        token_slots=none,
        token_positions=none,
        slots=none,
        starts=none,
        lens=none,
        contexts=none,
        tiles=np.empty((0, 5), dtype=np.int32),
        joins=np.empty((0, 4), dtype=np.int32),
        last_tokens=none,
        sampled_slots=none,
    )
    return pad(empty, shape, padding_slot=padding_slot)


def stage(
    arrays: MixedArrays, *, ring: StagingRing, slots: DeviceSlots, rotary: RotaryTables
) -> MixedInputs:
    """Send a step's integers to the device. `rotary`: cos and sin.

    In one ring, steps of one shape lie at the same addresses, except `last_tokens` and `sampled_slots`.
    """
    external = arrays.external or ExternalArrays(_NONE, _NONE, _NONE)
    *staged, starts, of_contexts, context_starts = ring.stage(
        (*arrays.padded, arrays.last_tokens, arrays.sampled_slots, *external.arrays)
    )
    decode_slots, decode_positions, token_ids, token_slots, token_positions, *of_rows, last, sampled_slots = staged
    external_chunks = None
    if arrays.external is not None:
        contexts = None
        if len(external.slots):
            num_tokens, longest = int(external.context_starts[-1]), int(np.diff(external.context_starts).max())
            contexts = Contexts(of_contexts, context_starts, num_tokens, longest)
        first_token = len(decode_slots) + len(token_ids) - int(external.starts[-1])
        external_chunks = ExternalChunks(first_token, starts, int(np.diff(external.starts).max()), contexts)
    batch = PagedBatch(
        num_decodes=len(decode_slots),
        decode_slots=decode_slots,
        positions=decode_positions,
        rotary_rows=decode_positions,
        tables=slots.tables,
        cos=rotary[0],
        sin=rotary[1],
        chunks=PromptChunks(token_slots, token_positions, token_positions, *of_rows, external=external_chunks),
    )
    return MixedInputs(token_ids, batch, last, sampled_slots)


def _starts(lens: Ints) -> Ints:
    """Where each of `lens` begins if they follow one another, and the end of the last. [P + 1]"""
    starts = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(lens, out=starts[1:])
    return starts


def _filled(array: Ints, num: int, value: int) -> Ints:
    """`array` followed by lines of `value`, `num` lines in all."""
    filled = np.full((num, *array.shape[1:]), value, dtype=np.int32)
    filled[: len(array)] = array
    return filled
