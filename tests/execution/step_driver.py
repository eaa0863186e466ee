"""A small driver that makes plans by hand: the tests' stand-in for the scheduler."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from headwater.execution.cpu_runner import CpuRunner
from headwater.messages.generation import LogprobParams, Pooling, SamplingParams, TokenLogprob
from headwater.scheduling.plan import (
    NEWEST_TOKEN,
    PageCopy,
    PageUpdate,
    SlotAssignment,
    StepPlan,
    StepResult,
    TokenMasks,
)

GREEDY = SamplingParams(temperature=0.0)


class DrivenRequest:
    """One request as the driver sees it."""

    def __init__(self, slot: int, use: int, prompt: Sequence[int], sampling: SamplingParams) -> None:
        self.slot, self.use, self.sampling = slot, use, sampling
        self.prompt = list(prompt)
        self.outputs: list[int] = []
        self.num_computed = 0
        self.pages: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.pooled: list[np.ndarray] = []  # one for each chunk that pools something
        self.mask: Callable[[int], np.ndarray] | None = None  # by the number of outputs: uint32 words
        self.has_had_draft = False
        self.num_accepted = 0

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < len(self.prompt)


class StepDriver:
    """Runs sequences on a runner: hands out pages in a random order, chunks prompts, batches what runs."""

    def __init__(self, runner: CpuRunner, *, seed: int = 0) -> None:
        self.runner = runner
        self._random = np.random.default_rng(seed)
        self._free_pages = self._random.permutation(runner.kv.num_pages).tolist()
        self._assignments: list[SlotAssignment] = []
        self._copies: list[PageCopy] = []
        self._updates: list[PageUpdate] = []
        self._num_uses = 0
        self.num_steps = 0

    def add(
        self,
        prompt: Sequence[int],
        *,
        slot: int,
        sampling: SamplingParams = GREEDY,
        stop_token_ids: tuple[int, ...] = (),
        logprobs: LogprobParams | None = None,
        num_prompt_tokens: int | None = None,
        pooling: Pooling | None = None,
    ) -> DrivenRequest:
        self._num_uses += 1
        sequence = DrivenRequest(slot, self._num_uses, prompt, sampling)
        self._assignments.append(
            SlotAssignment(
                slot=slot,
                use=self._num_uses,
                sampling=sampling,
                token_ids=np.array(prompt, dtype=np.int32),
                num_prompt_tokens=len(prompt) if num_prompt_tokens is None else num_prompt_tokens,
                stop_token_ids=stop_token_ids,
                logprobs=logprobs,
                pooling=pooling,
            )
        )
        return sequence

    def share(self, request: DrivenRequest, other: DrivenRequest, num_tokens: int) -> None:
        """Let `request` begin behind `num_tokens` of `other`: on its whole pages, and on a copy of a part of one."""
        num_pages, num_more = divmod(num_tokens, self.runner.kv.layout.page_size)
        request.pages = other.pages[:num_pages]
        if num_more:
            request.pages.append(self._free_pages.pop())
            self._copies.append(PageCopy(other.pages[num_pages], request.pages[-1], num_more))
        self._updates.append(PageUpdate(request.slot, 0, np.array(request.pages, dtype=np.int32)))
        request.num_computed = num_tokens

    def step(
        self, rows: Sequence[tuple[DrivenRequest, int]], drafts: Mapping[int, Sequence[int]] | None = None
    ) -> StepResult:
        """One step: (sequence, number of tokens) per row; decodes first. `drafts`: of decodes, by slot."""
        drafts = drafts or {}
        rows = sorted(rows, key=lambda row: row[0].is_prefilling)
        rows = [(it, num) for it, num in rows for _ in range(1 + len(drafts.get(it.slot, ())))]
        ahead = [sum(it is other for other, _ in rows[:row]) for row, (it, _) in enumerate(rows)]
        firsts = [it.num_computed + num_ahead for (it, _), num_ahead in zip(rows, ahead, strict=True)]
        token_ids, updates, samples = [], self._updates, []
        for (sequence, num_tokens), num_ahead in zip(rows, ahead, strict=True):
            end = sequence.num_computed + num_ahead + num_tokens
            if sequence.is_prefilling:
                token_ids += sequence.prompt[sequence.num_computed : end]
            elif num_ahead:
                token_ids.append(drafts[sequence.slot][num_ahead - 1])
            else:
                sequence.has_had_draft |= sequence.slot in drafts
                token_ids.append(sequence.outputs[-1] if sequence.has_had_draft else NEWEST_TOKEN)
            samples.append(end >= len(sequence.prompt))
            updates.extend(self._grow(sequence, end))
        plan = StepPlan(
            step_id=self.num_steps,
            assignments=tuple(self._assignments),
            page_updates=tuple(updates),
            slots=np.array([sequence.slot for sequence, _ in rows], dtype=np.int32),
            uses=np.array([sequence.use for sequence, _ in rows], dtype=np.int64),
            num_computed=np.array(firsts, dtype=np.int32),
            num_tokens=np.array([num_tokens for _, num_tokens in rows], dtype=np.int32),
            samples=np.array(samples, dtype=np.bool_),
            token_ids=np.array(token_ids, dtype=np.int32),
            num_decodes=sum(not sequence.is_prefilling for sequence, _ in rows),
            num_outputs=np.array([len(it.outputs) + n for (it, _), n in zip(rows, ahead, strict=True)], dtype=np.int32),
            page_copies=tuple(self._copies),
            grammar_rows=np.array(
                [row for row, (sequence, _) in enumerate(rows) if samples[row] and sequence.mask is not None],
                dtype=np.int32,
            ),
        )
        self._assignments, self._copies, self._updates = [], [], []
        self.num_steps += 1
        handle = self.runner.launch(plan)
        if len(plan.grammar_rows):
            assert not handle.is_done()
            masked = [rows[row][0] for row in plan.grammar_rows.tolist()]
            words = np.stack([sequence.mask(len(sequence.outputs)) for sequence in masked if sequence.mask])
            handle.choose(TokenMasks(rows=plan.grammar_rows, words=words))
        result = handle.collect()
        first_ids = np.cumsum(plan.num_tokens) - plan.num_tokens
        for row, (sequence, num_tokens) in enumerate(rows):
            if ahead[row]:
                if sequence.num_computed < firsts[row] or token_ids[first_ids[row]] != sequence.outputs[-1]:
                    continue  # computed from a token that is none of the request's
                sequence.num_accepted += 1
            sequence.num_computed += num_tokens
            if result.tokens[row] >= 0:
                sequence.outputs.append(int(result.tokens[row]))
            sequence.prompt_logprobs.extend(result.prompt_logprobs.get(row, ()))
            if row in result.pooled:
                sequence.pooled.append(np.array(result.pooled[row]))
            if row in result.logprobs:
                sequence.logprobs.append(result.logprobs[row])
        return result

    def run(self, sequences: Sequence[DrivenRequest], *, num_outputs: int, chunk: int = 10**6) -> None:
        """All sequences to `num_outputs` tokens each, prompts in random chunks of at most `chunk`."""
        while rows := [
            (sequence, self.next_tokens(sequence, chunk))
            for sequence in sequences
            if len(sequence.outputs) < num_outputs
        ]:
            self.step(rows)

    def next_tokens(self, sequence: DrivenRequest, chunk: int) -> int:
        if not sequence.is_prefilling:
            return 1
        return min(int(self._random.integers(1, chunk + 1)), len(sequence.prompt) - sequence.num_computed)

    def _grow(self, sequence: DrivenRequest, num_tokens: int) -> list[PageUpdate]:
        first = len(sequence.pages)
        needed = -(-num_tokens // self.runner.kv.layout.page_size) - first
        if needed <= 0:
            return []
        pages = [self._free_pages.pop() for _ in range(needed)]
        sequence.pages += pages
        return [PageUpdate(slot=sequence.slot, first=first, pages=np.array(pages, dtype=np.int32))]
