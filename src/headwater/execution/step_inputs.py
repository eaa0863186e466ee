"""A plan with prompt chunks in it, flattened into the integers that its kernels read."""

from dataclasses import dataclass

import numpy as np
import torch

from headwater.devices.paged_batch import PagedBatch, PromptChunks
from headwater.devices.triton_prefill import tiles
from headwater.execution.device_slots import DeviceSlots
from headwater.execution.staging import Ints, StagingRing
from headwater.scheduling.plan import StepPlan


@dataclass(frozen=True, slots=True)
class MixedInputs:
    """The inputs of one forward pass, on the device. T tokens."""

    token_ids: torch.Tensor  # int32[T], NEWEST_TOKEN where the slot's newest is meant
    token_slots: torch.Tensor  # int32[T]
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
    queries_per_tile: int,
) -> MixedInputs:
    """Send what a plan's kernels read to the device. `sampled`: the rows that sample; `rotary`: cos and sin."""
    assert plan.num_rows and (plan.num_tokens > 0).all(), "a plan computes at least one token in every row"
    ends = np.cumsum(plan.num_tokens, dtype=np.int32)
    starts = ends - plan.num_tokens
    rows = np.repeat(np.arange(plan.num_rows), plan.num_tokens)
    positions = np.arange(len(rows), dtype=np.int32) - starts[rows] + plan.num_computed[rows]
    token_slots = plan.slots[rows]
    chunks = slice(plan.num_decodes, None)
    contexts = plan.num_computed + plan.num_tokens
    tile_rows, tile_starts = tiles(plan.num_tokens[chunks], contexts[chunks], queries_per_tile)
    arrays = (
        plan.token_ids, token_slots, positions, plan.slots[: plan.num_decodes], token_slots[plan.num_decodes :],
        plan.slots[chunks], starts[chunks], plan.num_tokens[chunks], contexts[chunks], tile_rows, tile_starts,
        ends[sampled] - 1, plan.slots[sampled],
    )  # fmt: skip
    ids, all_slots, at, decode_slots, chunk_tokens, *of_chunks, last_tokens, sampled_slots = ring.stage(arrays)
    batch = PagedBatch(
        num_decodes=plan.num_decodes,
        decode_slots=decode_slots,
        positions=at,
        rotary_rows=at,
        tables=slots.tables,
        cos=rotary[0],
        sin=rotary[1],
        chunks=PromptChunks(chunk_tokens, *of_chunks) if plan.num_decodes < plan.num_rows else None,
    )
    return MixedInputs(ids, all_slots, batch, last_tokens, sampled_slots)
