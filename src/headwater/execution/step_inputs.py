"""A plan with prompt chunks in it, flattened into the integers that its kernels read."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from headwater.devices.paged_batch import PagedBatch, PromptChunks
from headwater.devices.prefill_tiles import PrefillTiles
from headwater.execution.device_slots import DeviceSlots
from headwater.execution.staging import Ints, StagingRing
from headwater.scheduling.plan import StepPlan


@dataclass(frozen=True, slots=True)
class MixedInputs:
    """The inputs of one forward pass, on the device. T tokens."""

    token_ids: torch.Tensor  # int32[T]; those of decodes are still to be filled in
    batch: PagedBatch
    last_tokens: torch.Tensor  # int32[number that sample], among the T
    sampled_slots: torch.Tensor  # int32[number that sample]


def stage_mixed(
    plan: StepPlan,
    sampled: Ints,
    *,
    ring: StagingRing,
    slots: DeviceSlots,
    rotary: tuple[torch.Tensor, torch.Tensor],
    plan_tiles: Callable[[Ints, Ints], PrefillTiles],
) -> MixedInputs:
    """Send what a plan's kernels read to the device. `sampled`: the rows that sample; `rotary`: cos and sin."""
    assert plan.num_rows and (plan.num_tokens > 0).all(), "a plan computes at least one token in every row"
    ends = np.cumsum(plan.num_tokens, dtype=np.int32)
    starts = ends - plan.num_tokens
    rows = np.repeat(np.arange(plan.num_rows), plan.num_tokens)
    positions = np.arange(len(rows), dtype=np.int32) - starts[rows] + plan.num_computed[rows]
    decodes, rest = slice(None, plan.num_decodes), slice(plan.num_decodes, None)  # of rows, and of tokens as well
    contexts = plan.num_computed + plan.num_tokens
    tiles = plan_tiles(plan.num_tokens[rest], contexts[rest])
    arrays = (
        plan.token_ids, plan.slots[decodes], positions[decodes], plan.slots[rows[rest]], positions[rest],
        plan.slots[rest], starts[rest], plan.num_tokens[rest], contexts[rest], tiles.tiles, tiles.joins,
        ends[sampled] - 1, plan.slots[sampled],
    )  # fmt: skip
    staged = ring.stage(arrays)
    ids, decode_slots, decode_positions, token_slots, token_positions, *of_rows, last_tokens, sampled_slots = staged
    batch = PagedBatch(
        num_decodes=plan.num_decodes,
        decode_slots=decode_slots,
        positions=decode_positions,
        rotary_rows=decode_positions,
        tables=slots.tables,
        cos=rotary[0],
        sin=rotary[1],
        chunks=PromptChunks(token_slots, token_positions, token_positions, *of_rows),
    )
    return MixedInputs(ids, batch, last_tokens, sampled_slots)
