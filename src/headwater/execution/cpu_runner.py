"""Runs step plans on a CPU (runner.Runner): inputs, forward pass, logits of the rows that need them, sampling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.adapters.memory import CpuAdapters
from headwater.devices.cpu.attention_kernels import WorkList
from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.packed_weights import PackedWeights
from headwater.devices.cpu.program import Program, StepArrays
from headwater.devices.cpu.ranks.segment import LOGIT_ROWS
from headwater.devices.kv_memory import KVLayout, KVMemory
from headwater.execution.batch import DecodeBatch, SlotTable, StepInputs
from headwater.execution.cpu.recorded_model import RecordedModel
from headwater.execution.logprobs import token_logprobs
from headwater.execution.prompt_parts import PooledPart, PromptPart, pooled_parts, prompt_parts
from headwater.execution.sampler import RowMasks, Sampler
from headwater.messages.generation import TokenLogprob
from headwater.models.decoder import DecoderModel
from headwater.models.loader import LoadedModel
from headwater.scheduling.plan import SlotAssignment, StepPlan, StepResult, TokenMasks


class ComputedStep:
    """A step (plan.StepHandle) whose logits are there: the CPU computes within `launch`.

    It samples there as well, if no grammar has to choose.
    """

    def __init__(self, sample: Callable[[TokenMasks | None], StepResult], *, needs_masks: bool) -> None:
        self._sample = sample
        self._result: StepResult | None = None if needs_masks else sample(None)

    def choose(self, masks: TokenMasks) -> None:
        assert self._result is None, "a step chooses once"
        self._result = self._sample(masks)

    def is_done(self) -> bool:
        return self._result is not None

    def collect(self) -> StepResult:
        assert self._result is not None, "the step's tokens have not been chosen"
        return self._result


@dataclass(slots=True)
class _Outcome:
    """The result of a step under way."""

    tokens: np.ndarray
    is_finite: np.ndarray
    logprobs: dict[int, TokenLogprob]
    prompt_logprobs: dict[int, tuple[TokenLogprob, ...]]
    pooled: dict[int, npt.NDArray[np.floating]]

    @classmethod
    def nothing(cls, plan: StepPlan) -> "_Outcome":
        """No row has sampled."""
        tokens, is_finite = np.full(plan.num_rows, -1, dtype=np.int32), np.ones(plan.num_rows, dtype=np.bool_)
        return cls(tokens, is_finite, logprobs={}, prompt_logprobs={}, pooled={})


class SampledRows:
    """Rows of a step that sample, and what their requests want to know of it. The same in each step of the requests."""

    def __init__(self, assigned: Sequence[SlotAssignment], sampler: Sampler) -> None:
        self._batch = sampler.batch([it.sampling for it in assigned], slots=[it.slot for it in assigned])
        self._wanted = [(row, it.logprobs) for row, it in enumerate(assigned) if it.logprobs is not None]
        self.needs_logits = bool(self._wanted) or self._batch.needs_logits

    def sample(
        self,
        logits: npt.NDArray[np.float32],
        num_outputs: npt.NDArray[np.int32],
        *,
        greedy: npt.NDArray[np.int32],
        masks: RowMasks | None,
    ) -> tuple[npt.NDArray[np.int32], dict[int, TokenLogprob]]:
        """The token of each row, and the log-probabilities of the rows that want them. Overwrites its inputs."""
        if not self._wanted:
            return self._batch.sample(logits, num_outputs, greedy=greedy, masks=masks), {}
        rows = [row for row, _ in self._wanted]
        raw = logits[rows]  # a copy: sampling edits the logits
        tokens = self._batch.sample(logits, num_outputs, greedy=greedy, masks=masks)
        answers = token_logprobs(raw, tokens[rows].tolist(), [params for _, params in self._wanted])
        return tokens, dict(zip(rows, answers, strict=True))


class CpuRunner:
    """Owns the KV memory and the state of the slots; the loaded model is shared.

    `max_running` slots, each of at most `max_context` tokens (the model's context if not given). `layout` is that
    of the KV's pages, `adapters` the memory of the LoRA adapters that rows may have. Where several ranks compute the
    model, each runs the same plans, and rank 0 samples: the results of the others hold no tokens, and no grammar
    chooses there.
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
        adapters: CpuAdapters | None = None,
    ) -> None:
        for name, value in (("num_pages", num_pages), ("max_running", max_running)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        self._model: DecoderModel | None = loaded.model  # None while the weights are released
        self._device = device
        self._weights_bytes = loaded.weights_bytes
        self._kv: KVMemory | None = device.allocate_kv(layout, num_pages)  # None while it is released
        max_pages = -(-(max_context or loaded.config.max_context) // layout.page_size)
        self._ranks = device.cpu_ranks
        self._samples = device.ranks.rank == 0
        self._slots = SlotTable(
            max_running=max_running,
            max_pages=max_pages,
            page_size=layout.page_size,
            newest=None if self._ranks is None else self._ranks.newest_tokens[:max_running],
        )
        self._sampler = Sampler(vocab_size=loaded.config.vocab_size, device=device)
        self._layout = layout
        self.adapters = adapters
        self._recorded: RecordedModel | None = RecordedModel(loaded.model, device, layout=layout, adapters=adapters)
        self._decodes: tuple[DecodeBatch, SampledRows] | None = None  # of the newest step, if it was of decodes alone

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the model and its KV, for EngineState."""
        return {"weights": self._weights_bytes, "kv_cache": 0 if self._kv is None else self._kv.num_bytes}

    @property
    def program(self) -> Program:
        """The ops of every step."""
        return self._model_in_place.program

    @property
    def packed_weights(self) -> list[PackedWeights]:
        """The matrices that a step of one row reads, packed; none without kernels. Of experts as many as it reads."""
        return self._model_in_place.packed_weights

    @property
    def model(self) -> DecoderModel:
        assert self._model is not None, "the weights are released"
        return self._model

    def replace_model(self, model: DecoderModel | None) -> None:
        """Compute with `model` from the next step on; None: free the weights' memory."""
        if self._recorded is not None:
            self._recorded.program.close()
        self._model = model
        self._recorded = None
        if model is not None:
            self._recorded = RecordedModel(model, self._device, layout=self._layout, adapters=self.adapters)
        self._decodes = None

    @property
    def kv(self) -> KVMemory:
        assert self._kv is not None, "the KV memory is released"
        return self._kv

    def replace_kv(self, kv: KVMemory | None) -> None:
        """Keep keys and values in `kv` from the next step on; None: free the memory."""
        self._kv = kv
        self._decodes = None

    @property
    def has_model(self) -> bool:
        return self._model is not None

    def launch(self, plan: StepPlan) -> ComputedStep:
        """Run one step to its end, or to its logits if grammars choose."""
        if self._ranks is not None:
            self._ranks.begin_step()
        self._slots.apply(plan)
        for copy in plan.page_copies:
            self.kv.memory[copy.target] = self.kv.memory[copy.source]  # whole: as fast as a part of it
        for assignment in plan.assignments:
            self._sampler.assign(assignment)
        if plan.num_decodes == plan.num_rows <= LOGIT_ROWS and not plan.has_drafts:
            sample = self._decode(plan)
        else:
            self._decodes = None
            sample = self._compute(plan)
        return ComputedStep(sample, needs_masks=self._samples and len(plan.grammar_rows) > 0)

    def _decode(self, plan: StepPlan) -> Callable[[TokenMasks | None], StepResult]:
        """A step of decodes alone, the most frequent kind. Returns what samples."""
        if self._decodes is None or not self._decodes[0].continues(plan):
            sampled = SampledRows(self._slots.assignments(plan, range(plan.num_rows)), self._sampler)
            batch = DecodeBatch(plan, self._slots, kv=self.kv.memory, make_work=self._attention_work)
            self._decodes = batch, sampled
        batch, sampled = self._decodes
        step = batch.step(plan)
        self._model_in_place.run(step, needs_logits=sampled.needs_logits or len(plan.grammar_rows) > 0)
        return partial(self._sample_decodes, plan, step, sampled)

    def _sample_decodes(
        self, plan: StepPlan, step: StepArrays, sampled: SampledRows, masks: TokenMasks | None
    ) -> StepResult:
        recorded = self._model_in_place
        if not self._samples:
            return self._end_step(plan, _Outcome.nothing(plan))
        greedy, is_finite = recorded.most_probable(step)
        row_masks = None if masks is None else RowMasks(masks.rows, masks.words)
        tokens, logprobs = sampled.sample(recorded.logits(step), plan.num_outputs, greedy=greedy, masks=row_masks)
        self._slots.set_newest(plan.slots, tokens)
        return self._end_step(plan, _Outcome(tokens, is_finite, logprobs, prompt_logprobs={}, pooled={}))

    def _compute(self, plan: StepPlan) -> Callable[[TokenMasks | None], StepResult]:
        """A step of any kind. Returns what samples."""
        inputs = self._slots.inputs(plan)
        rows = np.flatnonzero(plan.samples)
        step = self._step(inputs, inputs.last_tokens[rows[:LOGIT_ROWS]], num_decodes=plan.num_decodes)
        self._model_in_place.run(step, needs_logits=self._needs_logits(plan, rows[:LOGIT_ROWS]))
        return partial(self._sample_all, plan, inputs, step)

    def _needs_logits(self, plan: StepPlan, rows: npt.NDArray[np.integer]) -> bool:
        """Whether rank 0 needs the logits of all ranks to sample these rows. All ranks find the same."""
        if self._ranks is None:
            return True
        sampled = SampledRows(self._slots.assignments(plan, rows.tolist()), self._sampler)
        return sampled.needs_logits or bool(np.isin(plan.grammar_rows, rows).any())

    def _sample_all(self, plan: StepPlan, inputs: StepInputs, step: StepArrays, masks: TokenMasks | None) -> StepResult:
        outcome = _Outcome.nothing(plan)
        rows = np.flatnonzero(plan.samples)
        for start in range(0, len(rows), LOGIT_ROWS):
            block = rows[start : start + LOGIT_ROWS]
            if start:
                step = replace(step, selected=inputs.last_tokens[block])
                self._model_in_place.run_logits(step, needs_logits=self._needs_logits(plan, block))
            if self._samples:
                self._sample(plan, block, step, outcome, masks=_masks_of(block, masks))
        if self._samples:
            self._slots.set_newest(plan.slots[rows], outcome.tokens[rows])
        for part in prompt_parts(plan, self._slots.assignment):
            outcome.prompt_logprobs[part.row] = self._prompt_logprobs(part, step)
        for part in pooled_parts(plan, self._slots.assignment):
            outcome.pooled[part.row] = self._pool_hidden(part, step)
        return self._end_step(plan, outcome)

    def _end_step(self, plan: StepPlan, outcome: _Outcome) -> StepResult:
        if self._ranks is not None:
            self._ranks.end_step()
        return StepResult(
            step_id=plan.step_id,
            slots=plan.slots,
            uses=plan.uses,
            tokens=outcome.tokens,
            is_finite=outcome.is_finite,
            logprobs=outcome.logprobs,
            prompt_logprobs=outcome.prompt_logprobs,
            pooled=outcome.pooled,
        )

    def recover(self) -> None:
        """Nothing to do: a step that raised ran within `launch`, and has ended."""

    @property
    def _model_in_place(self) -> RecordedModel:
        assert self._recorded is not None, "the weights are released"
        return self._recorded

    def _attention_work(
        self,
        query_starts: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        page_tables: npt.NDArray[np.int32],
        *,
        num_decodes: int,
    ) -> WorkList:
        return self._device.attention_work(
            self.model.geometry,
            query_starts,
            context_lens,
            page_tables=page_tables,
            page_size=self.kv.layout.page_size,
            num_decodes=num_decodes,
        )

    def _step(self, inputs: StepInputs, selected: npt.NDArray[np.int32], *, num_decodes: int) -> StepArrays:
        """A step for the program; `selected` are the tokens whose logits are computed with it."""
        work = self._attention_work(
            inputs.query_starts, inputs.context_lens, inputs.page_tables, num_decodes=num_decodes
        )
        return StepArrays(
            token_ids=inputs.token_ids,
            positions=inputs.positions,
            query_starts=inputs.query_starts,
            context_lens=inputs.context_lens,
            page_tables=inputs.page_tables,
            selected=selected,
            kv=self.kv.memory,
            chunks=work.chunks,
            queries_per_chunk=work.queries_per_chunk,
            partial_slots=work.partial_slots,
            next_sharing=work.next_sharing,
            num_decodes=num_decodes,
            adapter_rows=inputs.adapters.rows,
            adapter_tiles=inputs.adapters.tiles,
        )

    def _sample(
        self, plan: StepPlan, rows: np.ndarray, step: StepArrays, outcome: _Outcome, *, masks: RowMasks | None
    ) -> None:
        """Sample the given rows of the plan, whose logits the step has computed."""
        greedy, is_finite = self._model_in_place.most_probable(step)
        logits = self._model_in_place.logits(step)
        sampled = SampledRows(self._slots.assignments(plan, rows.tolist()), self._sampler)
        tokens, logprobs = sampled.sample(logits, plan.num_outputs[rows], greedy=greedy, masks=masks)
        outcome.tokens[rows] = tokens
        outcome.is_finite[rows] = is_finite
        outcome.logprobs.update((int(rows[index]), it) for index, it in logprobs.items())

    def _pool_hidden(self, part: PooledPart, step: StepArrays) -> npt.NDArray[np.floating]:
        """The sum of a part's hidden states, a block of rows at a time: the arrays have room for logits of all."""
        total = np.zeros(self.model.config.hidden_size)
        for first in range(part.start, part.end, LOGIT_ROWS):
            selected = np.arange(first, min(first + LOGIT_ROWS, part.end), dtype=np.int32)
            total += self._model_in_place.run_norm(replace(step, selected=selected)).sum(axis=0, dtype=np.float64)
        return total

    def _prompt_logprobs(self, part: PromptPart, step: StepArrays) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the prompt tokens that a chunk of the step predicted, a block of rows at a time."""
        answers: list[TokenLogprob] = []
        for start in range(0, len(part.token_ids), LOGIT_ROWS):
            ids = part.token_ids[start : start + LOGIT_ROWS]
            first = part.start + start
            step = replace(step, selected=np.arange(first, first + len(ids), dtype=np.int32), samples=False)
            self._model_in_place.run_logits(step)
            if not self._samples:
                continue
            answers.extend(token_logprobs(self._model_in_place.logits(step), ids, [part.params] * len(ids)))
        return tuple(answers)


def _masks_of(rows: np.ndarray, masks: TokenMasks | None) -> RowMasks | None:
    """The masks of some rows of a plan (ascending), with the rows' indices among them; None if they have none."""
    if masks is None:
        return None
    has_mask = np.isin(masks.rows, rows)
    if not has_mask.any():
        return None
    at = np.searchsorted(rows, masks.rows[has_mask]).astype(np.int32)
    return RowMasks(at, masks.words if has_mask.all() else np.ascontiguousarray(masks.words[has_mask]))
