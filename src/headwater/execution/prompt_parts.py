"""What requests want of the prompt chunks of a step: log-probabilities of tokens, and pooled hidden states."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from headwater.messages.generation import LogprobParams
from headwater.scheduling.plan import SlotAssignment, StepPlan


@dataclass(frozen=True, slots=True)
class PromptPart:
    """Consecutive prompt tokens of one row; token i is predicted by the step's token `start + i`."""

    row: int
    start: int
    token_ids: list[int]
    params: LogprobParams


def prompt_parts(plan: StepPlan, assignment_of: Callable[[int, int], SlotAssignment]) -> Iterator[PromptPart]:
    """The requested parts that a plan's chunks predict. `assignment_of(slot, use)` is the request's assignment."""
    ends = np.cumsum(plan.num_tokens)
    for row in range(plan.num_decodes, plan.num_rows):
        assignment = assignment_of(int(plan.slots[row]), int(plan.uses[row]))
        params = assignment.logprobs
        if params is None or params.prompt_start < 0:
            continue
        num_computed, num_tokens = int(plan.num_computed[row]), int(plan.num_tokens[row])
        first = max(num_computed + 1, params.prompt_start)
        end = min(num_computed + num_tokens + 1, assignment.num_prompt_tokens)
        if first < end:
            start = int(ends[row]) - 1 - num_tokens + first - num_computed  # predicts position `first`
            yield PromptPart(row, start, assignment.token_ids[first:end].tolist(), params)


class PooledPart(NamedTuple):
    """The sum of the hidden states of the step's tokens [start, end) belongs to the embedding of a row."""

    row: int
    start: int
    end: int


def pooled_parts(plan: StepPlan, assignment_of: Callable[[int, int], SlotAssignment]) -> Iterator[PooledPart]:
    """The parts of a plan's chunks. `mean` sums every token of every chunk, `last` takes the prompt's last token."""
    ends = np.cumsum(plan.num_tokens)
    for row in range(plan.num_decodes, plan.num_rows):
        assignment = assignment_of(int(plan.slots[row]), int(plan.uses[row]))
        if assignment.pooling is None:
            continue
        end, num_tokens = int(ends[row]), int(plan.num_tokens[row])
        if assignment.pooling == "mean":
            yield PooledPart(row, end - num_tokens, end)
        elif int(plan.num_computed[row]) + num_tokens >= assignment.num_prompt_tokens:
            yield PooledPart(row, end - 1, end)
