"""The prompt tokens that the chunks of a step predict, of requests that ask for their log-probabilities."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
