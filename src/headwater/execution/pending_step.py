"""A step that the GPU computes while the loop goes on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from headwater.execution.device_logprobs import LogprobTensors, as_answers
from headwater.execution.staging import Fence
from headwater.messages.generation import LogprobParams, TokenLogprob
from headwater.scheduling.plan import StepPlan, StepResult, TokenMasks


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Log-probabilities on their way to the host.

    `token_ids` are the tokens; None: the tokens sampled in `rows`.
    """

    found: LogprobTensors
    rows: list[int]  # of the plan; one row, repeated, for the tokens of a prompt
    token_ids: list[int] | None
    params: list[LogprobParams]


@dataclass(slots=True)
class PendingStep:
    """A launched step (plan.StepHandle). Its results are on the host once `done` is passed.

    If grammars limit its choice, `sample` enqueues the choice, its results and `done`.
    """

    plan: StepPlan
    done: Fence
    sampled: np.ndarray  # rows of the plan that sample
    outcome: torch.Tensor  # int32[2, >= len(sampled)] on the host: tokens, and whether their logits were finite
    logprobs: list[PendingLogprobs]
    pooled: Mapping[int, torch.Tensor]  # by row, on the host
    sample: Callable[[TokenMasks], None] | None = None  # until it has been called

    def choose(self, masks: TokenMasks) -> None:
        assert self.sample is not None, "a step chooses once"
        self.sample(masks)
        self.sample = None

    def is_done(self) -> bool:
        return self.sample is None and self.done.is_passed()

    def collect(self) -> StepResult:
        assert self.sample is None, "the step's tokens have not been chosen"
        self.done.wait()
        plan, outcome = self.plan, self.outcome[:, : len(self.sampled)].numpy()
        tokens = np.full(plan.num_rows, -1, dtype=np.int32)
        is_finite = np.ones(plan.num_rows, dtype=np.bool_)
        tokens[self.sampled] = outcome[0]
        is_finite[self.sampled] = outcome[1] != 0
        of_outputs: dict[int, TokenLogprob] = {}
        of_prompts: dict[int, tuple[TokenLogprob, ...]] = {}
        for pending in self.logprobs:
            if pending.token_ids is None:
                answers = as_answers(pending.found, tokens[pending.rows].tolist(), pending.params)
                of_outputs.update(zip(pending.rows, answers, strict=True))
            else:
                answers = as_answers(pending.found, pending.token_ids, pending.params)
                row = pending.rows[0]
                of_prompts[row] = of_prompts.get(row, ()) + tuple(answers)
        return StepResult(
            step_id=plan.step_id,
            slots=plan.slots,
            uses=plan.uses,
            tokens=tokens,
            is_finite=is_finite,
            logprobs=of_outputs,
            prompt_logprobs=of_prompts,
            pooled={row: hidden.numpy() for row, hidden in self.pooled.items()},
        )
