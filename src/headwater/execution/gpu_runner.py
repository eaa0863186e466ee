"""Runs step plans on a GPU (runner.Runner) without waiting: `launch` enqueues a step, its handle reads the result.

A step needs the newest token of each slot from the step before it. These tokens stay on the device, so a step is
enqueued while the one before it is computed. The choice in rows with a grammar is enqueued later, when the masks are
there. Steps of decodes alone and small steps with prompts or drafts are CUDA graphs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from msgspec.structs import replace

from headwater.devices.cuda.adapters import CudaAdapters, CudaStepAdapters
from headwater.devices.cuda.arrivals import Arrivals
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels.greedy import GreedyScratch, choose_greedy
from headwater.devices.cuda.kernels.page_copy import copy_pages
from headwater.devices.cuda.layer_gates import GatedAttention, LayerGates
from headwater.devices.cuda.ranks.group import RankedLogits
from headwater.devices.cuda.torch_tensors import torch_dtype
from headwater.devices.kv_memory import KVLayout, KVMemory
from headwater.execution.decode_inputs import DecodeInputs
from headwater.execution.device_logprobs import compute_logprobs
from headwater.execution.device_sampler import DeviceSampler
from headwater.execution.device_slots import DeviceSlots
from headwater.execution.pending_step import PendingLogprobs, PendingStep
from headwater.execution.prompt_parts import PooledPart, PromptPart, pooled_parts, prompt_parts
from headwater.execution.prompt_steps import PromptSteps
from headwater.execution.staging import Fence, Ints, StagingRing, pinned, to_host
from headwater.execution.step_graphs import GraphPool, StepGraphs, next_size
from headwater.execution.step_inputs import MixedInputs
from headwater.models.decoder import DecoderModel
from headwater.models.loader import LoadedModel
from headwater.models.ranks.share import ModelShare
from headwater.scheduling.plan import NEWEST_TOKEN, PageCopy, StepPlan, TokenMasks

# rows of a prompt's logits in memory at once: 64 rows of a vocabulary of 150,000 are 38 MB
_LOGIT_ROWS = 64
_POOLED_ROWS = 1024  # of hidden states after the last norm, in memory at once
_COPY_PROGRAMS = 256  # the whole card copies, since the step waits
_NUM_RESULTS = 3  # steps whose results may be on the host: one being read, one computed, one enqueued


class _Prompts(NamedTuple):
    """What requests want of the prompts of a step, on its way to the host."""

    logprobs: Sequence[PendingLogprobs] = ()
    pooled: Mapping[int, torch.Tensor] = {}


class GpuRunner:
    """Owns the KV memory and the device's state of the slots; the loaded model is shared.

    `max_running` slots, each of at most `max_context` tokens (the model's context if not given). `layout` is that
    of the KV's pages. `graph_sizes` are the batch sizes of decodes that become CUDA graphs, `prompt_graph_sizes` those
    of other steps: (decodes, other tokens). Steps wait for the pages of `arrivals`, which a copier adds to. `adapters`
    is the memory of the LoRA adapters that rows may have. Drafts add at most `max_drafted` rows to a step.

    Where several ranks compute the model, each runs the same plans, and rank 0 samples: the others get its tokens on
    their devices, and no grammar chooses there.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        device: CudaDevice,
        *,
        layout: KVLayout,
        num_pages: int,
        max_running: int,
        max_context: int | None = None,
        graph_sizes: Sequence[int] = (),
        prompt_graph_sizes: Sequence[tuple[int, int]] = (),
        arrivals: Arrivals | None = None,
        adapters: CudaAdapters | None = None,
        max_drafted: int = 0,
    ) -> None:
        for name, value in (("num_pages", num_pages), ("max_running", max_running)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        if max(graph_sizes, default=0) > max_running:
            raise ValueError(f"graph_sizes must be at most max_running ({max_running}), got {max(graph_sizes)}")
        dtype = torch_dtype(loaded.dtype)
        device.check_attention(loaded.model.geometry, dtype, kv_dtype=layout.dtype)
        place = device.torch_device
        max_context = max_context or loaded.config.max_context
        max_rows = max_running + max_drafted  # that sample in a step
        self._model: DecoderModel | None = loaded.model  # None while the weights are released
        self._device = device
        self._weights_bytes = loaded.weights_bytes
        self._kv: KVMemory | None = device.allocate_kv(layout, num_pages)  # None while it is released
        self._slots = DeviceSlots(place, max_running=max_running, max_pages=-(-max_context // layout.page_size))
        vocab_size = loaded.config.vocab_size
        self._ranks, share = device.cuda_ranks, loaded.share
        self._ranked: RankedLogits | None = None
        if self._ranks is not None:
            tokens = [ModelShare(rank, share.size).tokens(loaded.config) for rank in range(share.size)]
            self._ranked = RankedLogits(self._ranks, tokens)
        self._greedy = GreedyScratch(max_rows=max_rows, vocab_size=vocab_size, device=place)
        self._sampler = DeviceSampler(
            place, max_running=max_running, max_rows=max_rows, vocab_size=vocab_size, scratch=self._greedy
        )
        with torch.inference_mode():
            self._rotary = device.rotary_tables(loaded.model.rotary, max_context)
        device.reserve_decodes(loaded.model.geometry, max_running)
        # shared by all steps: a graph with logits of its own would keep them for ever
        num_tokens = len(share.tokens(loaded.config))
        self._logits = torch.empty((max_rows, num_tokens), dtype=torch.float32, device=place)
        self._result = torch.zeros((2, max_rows), dtype=torch.int32, device=place)
        self._results = [pinned((2, max_rows), torch.int32, place) for _ in range(_NUM_RESULTS)]
        self._num_launched = 0
        self._index_ring = StagingRing(place, num_ints=2 * (max_rows + 16))
        self._decode_inputs = DecodeInputs(self._slots, rotary=self._rotary)
        self._pool = GraphPool() if device.is_gpu else None
        self._graph_sizes = tuple(graph_sizes)
        self.adapters = adapters
        # by whether a row has an adapter: other steps launch nothing for adapters
        self._graphs = {
            has_adapters: StepGraphs(
                partial(self._compute_decodes, has_adapters=has_adapters),
                lambda _: self._decode_inputs.stage_nothing(),
                shapes=self._graph_sizes,
                pool=self._pool,
            )
            for has_adapters in ((False,) if adapters is None else (False, True))
        }
        self._prompt_steps = {
            has_adapters: PromptSteps(
                device,
                partial(self._forward_mixed, has_adapters=has_adapters),
                geometry=loaded.model.geometry,
                dtype=dtype,
                slots=self._slots,
                rotary=self._rotary,
                sizes=prompt_graph_sizes,
                pool=self._pool,
            )
            for has_adapters in self._graphs
        }
        self._logprobs = partial(compute_logprobs, is_deterministic=device.is_deterministic)
        self._gates = LayerGates(loaded.config.num_layers, device=place)
        self._arrivals = Arrivals() if arrivals is None else arrivals

    # --- memory ------------------------------------------------------------------------------------

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the model and its KV, for EngineState."""
        return {"weights": self._weights_bytes, "kv_cache": 0 if self._kv is None else self._kv.num_bytes}

    @property
    def model(self) -> DecoderModel:
        assert self._model is not None, "the weights are released"
        return self._model

    @property
    def has_model(self) -> bool:
        return self._model is not None

    def replace_model(self, model: DecoderModel | None) -> None:
        """Compute with `model` from the next step on; None: free the weights' memory."""
        self._model = model
        self._clear_graphs()

    @property
    def kv(self) -> KVMemory:
        assert self._kv is not None, "the KV memory is released"
        return self._kv

    def replace_kv(self, kv: KVMemory | None) -> None:
        """Keep keys and values in `kv` from the next step on; None: free the memory."""
        self._kv = kv
        self._clear_graphs()

    def _clear_graphs(self) -> None:
        for steps in (*self._graphs.values(), *self._prompt_steps.values()):
            steps.clear()
        if self._pool is not None:
            self._pool.renew()

    @property
    def num_graphs_missing(self) -> int:
        """Graphs that `capture_graphs` would capture now."""
        return sum(steps.num_missing for steps in (*self._graphs.values(), *self._prompt_steps.values()))

    @torch.inference_mode()
    def capture_graphs(self, captured: Callable[[], None] = lambda: None) -> None:
        """Capture the graphs of all sizes now instead of on first use. `captured` is called after each."""
        self._device.enter_thread()
        for has_adapters, graphs in self._graphs.items():
            graphs.capture_all("decode batches with adapters" if has_adapters else "decode batches", captured)
            self._prompt_steps[has_adapters].capture_all(captured)

    # --- steps -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Enqueue one step."""
        self._device.enter_thread()
        self._slots.apply(plan)
        if plan.page_copies:
            self._copy_pages(plan.page_copies)
        for assignment in plan.assignments:
            self._sampler.assign(assignment)
        sampled = np.flatnonzero(plan.samples).astype(np.int32)
        if plan.num_decodes == plan.num_rows and not (self._device.is_deterministic or plan.has_drafts):
            logits, prompts = self._launch_decodes(plan), _Prompts()
        else:
            logits, prompts = self._launch_mixed(plan, sampled)
        step = PendingStep(
            plan=plan,
            done=Fence(self._device.torch_device),
            sampled=sampled,
            outcome=self._results[self._num_launched % _NUM_RESULTS],
            logprobs=list(prompts.logprobs),
            pooled=prompts.pooled,
        )
        self._num_launched += 1
        is_gathered = self._ranked is not None and self._needs_logits(plan, sampled)
        if is_gathered and self._ranked is not None:
            logits = self._ranked.gather(logits[: len(sampled)])
        elif self._ranked is not None:
            self._draw_over_ranks(self._ranked, plan, sampled, logits)
        if self._device.ranks.rank > 0 or (self._ranked is not None and not is_gathered):
            self._end(step, is_gathered=is_gathered)
        elif len(plan.grammar_rows):
            step.sample = partial(self._sample_masked, step, logits)  # all rows: two launches take twice as long as one
        else:
            self._sample(step, logits)
            self._end(step, is_gathered=is_gathered)
        return step

    def _needs_logits(self, plan: StepPlan, sampled: Ints) -> bool:
        """Whether rank 0 needs the logits of all ranks. All find the same.

        Not for rows that are greedy or draw from all tokens: the best of each rank's tokens decides.
        """
        slots, sampler = plan.slots[sampled], self._sampler
        needs = (sampler.is_special[slots] & ~sampler.draws_from_all[slots]) | sampler.has_logprobs[slots]
        return bool(needs.any()) or len(plan.grammar_rows) > 0

    def _draw_over_ranks(self, ranked: RankedLogits, plan: StepPlan, sampled: Ints, logits: torch.Tensor) -> None:
        """Each rank draws from its part of the vocabulary, by the noise of these tokens; the best is the draw."""
        slots = plan.slots[sampled]
        rows = np.flatnonzero(self._sampler.draws_from_all[slots]).astype(np.int32)
        if len(rows):
            num_outputs = plan.num_outputs[sampled[rows]]
            at, to, part = self._sampler.draw_part(
                logits, rows, slots=slots[rows], num_outputs=num_outputs, tokens=ranked.own_tokens
            )
            ranked.merge_draws(part, at, to, newest=self._slots.newest, result=self._result)

    @torch.inference_mode()
    def _sample_masked(self, step: PendingStep, logits: torch.Tensor, masks: TokenMasks) -> None:
        """Choose in all rows, which ends the step. No other step was launched meanwhile."""
        self._sample(step, logits, masks)
        self._end(step, is_gathered=self._ranked is not None)

    def _end(self, step: PendingStep, *, is_gathered: bool) -> None:
        """`is_gathered`: rank 0 alone has sampled, and the other ranks get its tokens."""
        if is_gathered and self._ranks is not None:
            self._ranks.broadcast(self._slots.newest)
        step.outcome.copy_(self._result, non_blocking=True)  # all of it: PyTorch would wait for a part
        step.done.record()

    def _copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Enqueue the copies of a step. Nothing else writes their sources, and the step runs behind them."""
        pairs = np.array([(copy.source, copy.target) for copy in copies], dtype=np.int32)
        sources, targets = self._index_ring.stage((pairs[:, 0], pairs[:, 1]))
        words = self.kv.memory.view(torch.int64)
        copy_pages(words, sources, words, targets, num_programs=_COPY_PROGRAMS)

    def recover(self) -> None:
        """Wait for the kernels of a failed step. Raises again after a sticky error of the device."""
        self._device.synchronize()

    def _launch_decodes(self, plan: StepPlan) -> torch.Tensor:
        """A step of decodes alone; returns the logits, a row for each."""
        size = next_size(self._graph_sizes, plan.num_rows) or plan.num_rows
        graphs = self._graphs[self._slots.has_adapters(plan.slots)]
        graphs.prepare(size)
        self._decode_inputs.stage(plan.slots, plan.num_computed)
        return graphs.run(size)

    def _compute_decodes(self, size: int, *, has_adapters: bool) -> torch.Tensor:
        """Enqueue a step of `size` rows over the static inputs: greedy tokens into `_result`; returns the logits."""
        batch = self._decode_inputs.batch(size)
        attention = self._device.plan_attention(self.model.geometry, batch, kv=self.kv)
        adapters = self._adapters_of(batch.decode_slots) if has_adapters else None
        hidden = self.model.forward(self._slots.newest.index_select(0, batch.decode_slots), attention, adapters)
        return self._greedy_logits(hidden, batch.decode_slots)

    def _launch_mixed(self, plan: StepPlan, sampled: Ints) -> tuple[torch.Tensor, "_Prompts"]:
        """A step with chunks; returns the logits of the rows that sample, and what requests want of prompts."""
        self._gates.follow(self._arrivals.awaited())
        # by the kernels of prompts, decodes have the bits of a prompt that repeats them
        computed = replace(plan, num_decodes=0) if self._device.is_deterministic else plan
        step = self._prompt_steps[self._slots.has_adapters(plan.slots)].launch(computed, sampled)
        hidden, assignment = step.hidden[step.shift :], self._slots.assignment
        logprobs = [it for part in prompt_parts(plan, assignment) for it in self._prompt_logprobs(hidden, part)]
        pooled = {part.row: self._pool_hidden(hidden, part) for part in pooled_parts(plan, assignment)}
        prompts = _Prompts(logprobs, pooled)
        if not len(sampled):
            return step.hidden[:0], prompts
        return self._greedy_logits(step.hidden.index_select(0, step.last_tokens), step.sampled_slots), prompts

    def _adapters_of(self, slots: torch.Tensor) -> CudaStepAdapters:
        """The adapters of tokens of these slots."""
        assert self.adapters is not None, "a row has an adapter, and there is no memory for adapters"
        return self.adapters.of_step(self._slots.adapters.index_select(0, slots))

    def _forward_mixed(self, inputs: MixedInputs, *, has_adapters: bool) -> torch.Tensor:
        """Hidden states of a step with chunks, decodes first; layers wait for arriving pages."""
        batch, token_ids, model = inputs.batch, inputs.token_ids, self.model
        if self._device.is_deterministic:
            assert batch.chunks is not None, "all rows are chunks"
            newest = self._slots.newest.index_select(0, batch.chunks.token_slots)
            token_ids = torch.where(token_ids == NEWEST_TOKEN, newest, token_ids)
        elif batch.num_decodes:
            token_ids = torch.cat((self._slots.newest.index_select(0, batch.decode_slots), token_ids))
        attention = self._device.plan_attention(model.geometry, batch, kv=self.kv)
        adapters = None
        if has_adapters:
            assert batch.chunks is not None, "a step with prompts has chunks"
            adapters = self._adapters_of(torch.cat((batch.decode_slots, batch.chunks.token_slots)))
        return model.forward(token_ids, GatedAttention(attention, self._gates), adapters)

    def _greedy_logits(self, hidden: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        logits = self.model.logits(hidden, out=self._logits[: len(hidden)])
        choose_greedy(logits, slots, newest=self._slots.newest, result=self._result, scratch=self._greedy)
        if self._ranked is not None:
            self._ranked.merge_greedy(logits, slots, newest=self._slots.newest, result=self._result)
        return logits

    def _sample(self, step: PendingStep, logits: torch.Tensor, masks: TokenMasks | None = None) -> None:
        """Sample the rows of `logits`, and compute the log-probabilities that their requests ask for.

        Plainly greedy rows without a mask have their tokens already.
        """
        plan, slots = step.plan, step.plan.slots[step.sampled]
        wanted = np.flatnonzero(self._sampler.has_logprobs[slots]).astype(np.int32)
        raw = at = None
        if len(wanted):
            (at,) = self._index_ring.stage((wanted,))
            raw = logits.index_select(0, at)  # a copy: sampling edits the logits
        mask_indices = np.full(len(slots), -1, dtype=np.int32)
        if masks is not None:
            mask_indices[np.searchsorted(step.sampled, masks.rows)] = np.arange(len(masks.rows), dtype=np.int32)
        chosen = np.flatnonzero(self._sampler.is_special[slots] | (mask_indices >= 0)).astype(np.int32)
        if len(chosen):
            self._sampler.choose(
                logits,
                chosen,
                slots=slots[chosen],
                num_outputs=plan.num_outputs[step.sampled[chosen]],
                newest=self._slots.newest,
                result=self._result,
                masks=None if masks is None else masks.words,
                mask_indices=mask_indices[chosen],
            )
        if raw is not None and at is not None:
            rows = step.sampled[wanted].tolist()
            assigned = [self._slots.assignment(int(plan.slots[row]), int(plan.uses[row])) for row in rows]
            params = [it.logprobs for it in assigned if it.logprobs is not None]
            found = self._logprobs(raw, self._result[0].index_select(0, at).long(), params)
            step.logprobs.append(PendingLogprobs(found.moved(to_host), rows, None, params))

    def _pool_hidden(self, hidden: torch.Tensor, part: PooledPart) -> torch.Tensor:
        """The sum of a part's hidden states, on its way to the host."""
        blocks = hidden[part.start : part.end].split(_POOLED_ROWS)
        sums = [self.model.last_norm(block).sum(dim=0, dtype=torch.float32) for block in blocks]
        return to_host(torch.stack(sums).sum(dim=0))

    def _prompt_logprobs(self, hidden: torch.Tensor, part: PromptPart) -> Iterator[PendingLogprobs]:
        """Log-probabilities of the prompt tokens that a chunk predicted, a block of rows at a time."""
        for start in range(0, len(part.token_ids), _LOGIT_ROWS):
            ids = part.token_ids[start : start + _LOGIT_ROWS]
            logits = self.model.logits(hidden[part.start + start : part.start + start + len(ids)])
            if self._ranked is not None:
                logits = self._ranked.gather(logits)
            if self._device.ranks.rank > 0:
                continue
            params = [part.params] * len(ids)
            on_device = torch.tensor(ids, device=logits.device)
            yield PendingLogprobs(self._logprobs(logits, on_device, params).moved(to_host), [part.row], ids, params)
