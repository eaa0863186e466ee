"""Runs step plans on a CPU (runner.Runner): inputs, forward pass, logits of the rows that need them, sampling."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.kv_memory import KVLayout, KVMemory
from headwater.execution.batch import SlotTable
from headwater.execution.logprobs import token_logprobs
from headwater.execution.prompt_logprobs import prompt_parts
from headwater.execution.sampler import Sampler
from headwater.messages.generation import LogprobParams, TokenLogprob
from headwater.models.decoder import DecoderModel
from headwater.models.loader import LoadedModel
from headwater.scheduling.plan import StepPlan, StepResult

Numbers = npt.NDArray[np.float32]

# rows of logits in memory at once: 64 rows of a vocabulary of 150,000 are 38 MB
_LOGIT_ROWS = 64


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step (plan.StepHandle) whose result is there already: the CPU computes within `launch`."""

    result: StepResult

    def is_done(self) -> bool:
        return True

    def collect(self) -> StepResult:
        return self.result


@dataclass(slots=True)
class _Outcome:
    """The result of a step under way."""

    tokens: np.ndarray
    is_finite: np.ndarray
    logprobs: dict[int, TokenLogprob]
    prompt_logprobs: dict[int, tuple[TokenLogprob, ...]]


class CpuRunner:
    """Owns the KV memory and the state of the slots; the loaded model is shared.

    `max_running` slots, each of at most `max_context` tokens (the model's context if not given). `layout` is that
    of the KV's pages.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        device: CpuDevice,
        *,
        layout: KVLayout,
        num_pages: int,
        max_running: int,
        max_context: int | None = None,
    ) -> None:
        for name, value in (("num_pages", num_pages), ("max_running", max_running)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        self._model: DecoderModel | None = loaded.model  # None while the weights are released
        self._device = device
        self._weights_bytes = loaded.weights_bytes
        self._kv: KVMemory | None = device.allocate_kv(layout, num_pages)  # None while it is released
        max_pages = -(-(max_context or loaded.config.max_context) // layout.page_size)
        self._slots = SlotTable(max_running=max_running, max_pages=max_pages, page_size=layout.page_size)
        self._sampler = Sampler(vocab_size=loaded.config.vocab_size, draw=device.draw)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the model and its KV, for EngineState."""
        return {"weights": self._weights_bytes, "kv_cache": 0 if self._kv is None else self._kv.num_bytes}

    @property
    def model(self) -> DecoderModel:
        assert self._model is not None, "the weights are released"
        return self._model

    def replace_model(self, model: DecoderModel | None) -> None:
        """Compute with `model` from the next step on; None: free the weights' memory."""
        self._model = model

    @property
    def kv(self) -> KVMemory:
        assert self._kv is not None, "the KV memory is released"
        return self._kv

    def replace_kv(self, kv: KVMemory | None) -> None:
        """Keep keys and values in `kv` from the next step on; None: free the memory."""
        self._kv = kv

    @property
    def has_model(self) -> bool:
        return self._model is not None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> FinishedStep:
        """Run one step to its end."""
        self._slots.apply(plan)
        for assignment in plan.assignments:
            self._sampler.assign(assignment)
        inputs = self._slots.inputs(plan, rotary=lambda positions: self.model.rotary(torch.from_numpy(positions)))
        attention = self._device.plan_attention(self.model.geometry, inputs.attention, kv=self.kv)
        hidden = self.model.forward(torch.from_numpy(inputs.token_ids), attention).numpy()
        outcome = _Outcome(
            tokens=np.full(plan.num_rows, -1, dtype=np.int32),
            is_finite=np.ones(plan.num_rows, dtype=np.bool_),
            logprobs={},
            prompt_logprobs={},
        )
        rows = np.flatnonzero(plan.samples)
        for start in range(0, len(rows), _LOGIT_ROWS):
            block = rows[start : start + _LOGIT_ROWS]
            self._sample(plan, block, hidden[inputs.last_tokens[block]], outcome)
        self._slots.set_newest(plan.slots[rows], outcome.tokens[rows])
        self._add_prompt_logprobs(plan, hidden, outcome)
        return FinishedStep(
            StepResult(
                step_id=plan.step_id,
                slots=plan.slots,
                uses=plan.uses,
                tokens=outcome.tokens,
                is_finite=outcome.is_finite,
                logprobs=outcome.logprobs,
                prompt_logprobs=outcome.prompt_logprobs,
            )
        )

    def recover(self) -> None:
        """Nothing to do: a step that raised ran within `launch`, and has ended."""

    def _sample(self, plan: StepPlan, rows: np.ndarray, hidden: Numbers, outcome: _Outcome) -> None:
        """Sample the given rows of the plan from the hidden states of their last tokens."""
        logits = self._logits(hidden)
        # Minimum and maximum propagate NaN.
        outcome.is_finite[rows] = np.isfinite(logits.min(axis=-1)) & np.isfinite(logits.max(axis=-1))
        slots = plan.slots[rows].tolist()
        assigned = [self._slots.assignment(slot, int(plan.uses[row])) for slot, row in zip(slots, rows, strict=True)]
        wanted = [(index, it.logprobs) for index, it in enumerate(assigned) if it.logprobs is not None]
        raw = logits[[index for index, _ in wanted]] if wanted else None  # a copy: sampling edits the logits
        tokens = self._sampler.sample(
            logits,
            [it.sampling for it in assigned],
            slots=slots,
            num_outputs=plan.num_outputs[rows].tolist(),
        )
        outcome.tokens[rows] = tokens
        if raw is not None:
            ids = [int(tokens[index]) for index, _ in wanted]
            answers = token_logprobs(raw, ids, [params for _, params in wanted])
            outcome.logprobs.update((int(rows[index]), it) for (index, _), it in zip(wanted, answers, strict=True))

    def _logits(self, hidden: Numbers) -> Numbers:
        """float32[N, hidden_size] -> float32[N, vocab_size]"""
        return self.model.logits(torch.from_numpy(hidden)).numpy()

    def _add_prompt_logprobs(self, plan: StepPlan, hidden: Numbers, outcome: _Outcome) -> None:
        """Log-probabilities of the prompt tokens that the chunks of this step predicted."""
        for part in prompt_parts(plan, self._slots.assignment):
            predicting = hidden[part.start : part.start + len(part.token_ids)]
            outcome.prompt_logprobs[part.row] = self._predictions(predicting, part.token_ids, part.params)

    def _predictions(self, hidden: Numbers, token_ids: list[int], params: LogprobParams) -> tuple[TokenLogprob, ...]:
        """Log-probability of each token given the hidden state before it, a block of rows at a time."""
        answers: list[TokenLogprob] = []
        for start in range(0, len(token_ids), _LOGIT_ROWS):
            ids = token_ids[start : start + _LOGIT_ROWS]
            logits = self._logits(hidden[start : start + len(ids)])
            answers.extend(token_logprobs(logits, ids, [params] * len(ids)))
        return tuple(answers)
