"""A runner without a model: its KV are canaries, written and read through the real page tables."""

import numpy as np
import numpy.typing as npt

from headwater.messages import TokenLogprob
from headwater.scheduling.plan import NEWEST_TOKEN, SlotAssignment, StepPlan, StepResult
from headwater.simulation.canary import START, next_canary, token_from
from headwater.simulation.fake_memory import FakeKvMemory, FakeWeights

_UNWRITTEN = 0


class FakeStep:
    """A step that has been computed, but says so only after it was asked `num_polls` times."""

    def __init__(self, result: StepResult, num_polls: int) -> None:
        self._result = result
        self._polls_left = num_polls

    def is_done(self) -> bool:
        self._polls_left -= 1
        return self._polls_left < 0

    def collect(self) -> StepResult:
        return self._result


class FakeRunner:
    """Computes canaries for tokens and tokens from canaries.

    With `is_async`, a step is never done in the turn that launched it, as on a GPU. Sampling parameters are
    ignored: every choice is the greedy one, and every log-probability is -1. The canary of a token depends on
    the weights that were in place when it was computed.
    """

    def __init__(
        self, *, num_pages: int, page_size: int, max_running: int, vocab_size: int, is_async: bool = False
    ) -> None:
        self.kv: npt.NDArray[np.uint64] = np.zeros((num_pages, page_size), dtype=np.uint64)
        self.num_steps = 0
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._is_async = is_async
        self._tables = np.full((max_running, num_pages), -1, dtype=np.int32)
        self._newest = np.zeros(max_running, dtype=np.int64)
        self._uses = np.zeros(max_running, dtype=np.int64)
        self._slots: dict[int, SlotAssignment] = {}
        self.weights = FakeWeights()
        self.kv_memory = FakeKvMemory(self.kv)

    def launch(self, plan: StepPlan) -> FakeStep:
        self.num_steps += 1
        self._apply_changes(plan)
        tokens = np.full(plan.num_rows, -1, dtype=np.int32)
        logprobs: dict[int, TokenLogprob] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        start = 0
        for row in range(plan.num_rows):
            slot, count = int(plan.slots[row]), int(plan.num_tokens[row])
            assert self._uses[slot] == plan.uses[row], "a plan names a slot by an earlier use"
            self._compute(slot, int(plan.num_computed[row]), plan.token_ids[start : start + count])
            prompt_logprobs |= self._prompt_logprobs(plan, row)
            if plan.samples[row]:
                length = int(plan.num_computed[row]) + count
                tokens[row] = token_from(self._read(slot, length), self._vocab_size)
                self._newest[slot] = tokens[row]
                if self._slots[slot].logprobs is not None:
                    logprobs[row] = TokenLogprob(token_id=int(tokens[row]), logprob=-1.0)
            start += count
        result = StepResult(
            step_id=plan.step_id,
            slots=plan.slots,
            uses=plan.uses,
            tokens=tokens,
            is_finite=np.ones(plan.num_rows, dtype=np.bool_),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        return FakeStep(result, num_polls=1 if self._is_async else 0)

    def _apply_changes(self, plan: StepPlan) -> None:
        for assignment in plan.assignments:
            self._slots[assignment.slot] = assignment
            self._uses[assignment.slot] = assignment.use
            self._tables[assignment.slot] = -1
        for update in plan.page_updates:
            self._tables[update.slot, update.first : update.first + len(update.pages)] = update.pages

    def _compute(self, slot: int, position: int, token_ids: npt.NDArray[np.int32]) -> None:
        before = int(self._read(slot, position)[-1]) if position else START
        for offset, token in enumerate(token_ids.tolist()):
            token = int(self._newest[slot]) if token == NEWEST_TOKEN else token
            before = next_canary(before, token, self.weights.current)
            page, at = divmod(position + offset, self._page_size)
            assert self._tables[slot, page] >= 0, "a token has no page to be written to"
            self.kv[self._tables[slot, page], at] = before

    def _read(self, slot: int, length: int) -> npt.NDArray[np.uint64]:
        """The canaries of positions [0, length), through the page table."""
        pages = self._tables[slot, : -(-length // self._page_size)]
        assert (pages >= 0).all(), "a position to be read has no page"
        read = self.kv[pages].reshape(-1)[:length]
        assert (read != _UNWRITTEN).all(), "KV is read that nothing has written"
        return read

    def _prompt_logprobs(self, plan: StepPlan, row: int) -> dict[int, tuple[TokenLogprob, ...]]:
        slot = self._slots[int(plan.slots[row])]
        if slot.logprobs is None or slot.logprobs.prompt_start < 0:
            return {}
        computed = int(plan.num_computed[row])
        first = max(computed + 1, slot.logprobs.prompt_start)
        stop = min(computed + int(plan.num_tokens[row]) + 1, slot.num_prompt_tokens)
        tokens = slot.token_ids[first:stop].tolist()
        return {row: tuple(TokenLogprob(token_id=t, logprob=-1.0) for t in tokens)} if tokens else {}
