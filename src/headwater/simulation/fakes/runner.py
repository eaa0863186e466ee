"""A runner without a model. Its KV are canaries, which it writes and reads through the real page tables."""

import logging
import random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headwater.messages.generation import LogprobParams, TokenLogprob
from headwater.scheduling.plan import NEWEST_TOKEN, SlotAssignment, StepPlan, StepResult, TokenMasks
from headwater.simulation.checks.violation import Violation, demand
from headwater.simulation.fakes.canary import (
    START,
    next_canaries,
    origin,
    pooled_canaries,
    token_from,
    total_of,
    with_adapter,
)
from headwater.simulation.fakes.grammar import choose_from, tokens_of
from headwater.simulation.fakes.kv_records import PACKED, TOKEN, Records, make_records
from headwater.simulation.fakes.memory import FakeAdapters, FakeKvMemory, FakeWeights
from headwater.simulation.fakes.step_audit import StepAudit

_UNWRITTEN = 0
PageIds = npt.NDArray[np.intp]  # the type that numpy indexes by without a conversion


class StepFault(Exception):
    """The error of a step that a test or a random run made fail."""


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], StepFault | Violation))


for _name in ("headwater.engine.steps", "headwater.engine.loop"):
    logging.getLogger(_name).addFilter(_is_news)


def check_written(read: bytes) -> None:
    """Check that no unwritten position is read."""
    assert np.frombuffer(read, dtype=np.uint64).all(), "KV is read that nothing has written"


class FakeStep:
    """A computed step that reports its end only at poll `num_polls`."""

    def __init__(self, result: StepResult, num_polls: int, *, read: list[PageIds], written: list[PageIds]) -> None:
        self.read = read  # pages in use until its collection
        self.written = written
        self.fault: Callable[[], None] | None = None  # raises at its collection
        self.on_collect: Callable[[], None] = lambda: None
        self.on_choose: Callable[[TokenMasks], None] | None = None  # due before the collection
        self.is_collected = False
        self._result = result
        self._polls_left = num_polls

    def choose(self, masks: TokenMasks) -> None:
        assert self.on_choose is not None, "a step with grammars chooses once, any other never"
        self.on_choose(masks)
        self.on_choose = None

    def is_done(self) -> bool:
        if self.on_choose is not None:
            return False
        self._polls_left -= 1
        return self._polls_left < 0

    def collect(self) -> StepResult:
        assert not self.is_collected, "a step is collected once"
        assert self.on_choose is None, "a step is collected before its tokens are chosen"
        self.is_collected = True
        if self.fault is not None:
            self.fault()
        self.on_collect()
        return self._result


class FakeRunner:
    """Computes canaries for tokens and tokens from canaries.

    With `is_async`, a step is never done in the turn that launched it, as on a GPU. Sampling parameters are ignored:
    every choice is greedy, and every log-probability is -1. The canary of a token depends on the weights at the time of
    its computation.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_running: int,
        vocab_size: int,
        is_async: bool = False,
        max_context: int | None = None,
    ) -> None:
        self.kv: Records = make_records(num_pages, page_size)
        self.copied_at = np.zeros(num_pages, dtype=np.uint32)  # turn of the last copy to a page
        self.audit: StepAudit | None = None
        self.wait_for_restores: Callable[[], None] = lambda: None  # for those that are readable but not done
        self.num_steps = 0
        self.not_finite_rate = 0.0  # of rows that sample
        self.fault_rate = 0.0  # of steps that raise, half of them at launch, half at collection
        self.next_fault: str | None = None  # place at which the next step raises
        self._chance = random.Random(num_pages)
        self.is_any_free: Callable[[PageIds], bool] = lambda pages: False
        self._failed: list[PageIds] = []  # pages of the rows of a step that has raised, until `recover`
        self._open: list[FakeStep] = []
        self._flat = self.kv.reshape(-1)
        self._pages = self.kv.view(np.uint8)  # [num_pages, bytes of a page], since numpy copies bytes fastest
        self._bytes = self._pages.reshape(-1).data
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._is_async = is_async
        width = num_pages if max_context is None else -(-max_context // page_size)  # as in a real runner
        self._taken = np.empty((width, self._pages.shape[1]), dtype=np.uint8)  # where the pages of a row are gathered
        self._taken_canaries = self._taken.view(TOKEN)["canary"]
        self._tables = np.full((max_running, width), -1, dtype=np.intp)
        self._num_mapped = [0] * max_running  # leading entries of each table that are in use
        self._all_finite = np.ones(max_running, dtype=np.bool_)
        self._newest = [0] * max_running
        self._uses = [0] * max_running
        self._origins: list[tuple[str, int]] = [("", 0)] * max_running  # namespace and sequence of each slot
        self._totals: list[tuple[bytes, int]] = [(b"", 0)] * max_running  # of what each slot read last, and that
        self._slots: dict[int, SlotAssignment] = {}
        self.weights = FakeWeights()
        self.kv_memory = FakeKvMemory(self.kv)
        self.adapters = FakeAdapters()
        self.weights.is_in_use = self.kv_memory.is_in_use = lambda: bool(self.open_steps)

    @property
    def open_steps(self) -> list[FakeStep]:
        """Steps that were launched but not collected."""
        if self._open:
            self._open = [step for step in self._open if not step.is_collected]
        return self._open

    def pages_read(self) -> set[int]:
        """Pages that steps in flight read or write."""
        return {page for step in self.open_steps for pages in step.read for page in pages.tolist()}

    def pages_written(self) -> set[int]:
        """Pages that steps in flight write."""
        return {page for step in self.open_steps for pages in step.written for page in pages.tolist()}

    def pages_of(self, slot: int, num_pages: int) -> Records:
        """Contents of the first pages of a slot. TOKEN[num_pages, page_size]."""
        return self.kv[self._tables[slot, :num_pages]]

    def records(self, pages: npt.NDArray[np.integer]) -> Records:
        """A copy of the contents of `pages`. TOKEN[len(pages), page_size]."""
        return np.frombuffer(self._pages.take(pages, axis=0), dtype=TOKEN).reshape(-1, self._page_size)

    def launch(self, plan: StepPlan) -> FakeStep:
        assert not self.kv_memory.is_released and not self.weights.is_released, "a step runs without memory"
        self.num_steps += 1
        taken = [self.kv[copy.source].copy() for copy in plan.page_copies]  # copies do not wait for restores
        if plan.num_decodes < len(plan.slots):  # decodes need not wait
            self.wait_for_restores()
        self._apply_changes(plan)
        birth = self.audit.turn if self.audit else self.num_steps
        copied = self._copy_pages(plan, taken, birth=birth)
        fault_at = self._take_fault()
        if fault_at == "launch":
            self._fail(plan)
        num_rows = len(plan.slots)
        tokens = [-1] * num_rows
        logprobs: dict[int, TokenLogprob] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        pooled: dict[int, npt.NDArray[np.floating]] = {}
        reads, writes, totals = [], [], []
        strays: set[int] = set()
        columns = (plan.slots, plan.uses, plan.num_computed, plan.num_tokens, plan.samples)
        all_tokens = plan.token_ids.tolist()
        start, slot_before = 0, -1
        for row, (slot, use, first, count, samples) in enumerate(zip(*[c.tolist() for c in columns], strict=True)):
            assert self._uses[slot] == use, "a plan names a slot by an earlier use"
            row_tokens = all_tokens[start : start + count]
            is_draft, slot_before = slot == slot_before, slot
            if is_draft and (row - 1 in strays or row_tokens[0] != tokens[row - 1]):
                strays.add(row)  # computed from a token that is none of the request's
            pages, read = self._compute(slot, first, row_tokens, birth=birth)
            if self.audit is not None:
                noise_at = int(plan.num_outputs[row]) if samples else None
                self.audit.computed(slot, first, row_tokens, read=read, noise_at=noise_at, is_draft=is_draft)
            else:
                check_written(read)
            reads.append(np.append(pages, copied.pop(slot)) if slot in copied else pages)
            writes.append(pages[first // self._page_size :])
            if self._slots[slot].logprobs is not None:
                prompt_logprobs |= self._prompt_logprobs(plan, row)
            if self._slots[slot].pooling is not None:
                pooled |= self._pooled(plan, row, read)
            if samples:
                total = self._total(slot, read)
                totals.append(total)
                tokens[row] = self._newest[slot] = token_from(total, self._vocab_size)
                asked = self._slots[slot].logprobs
                if asked is not None:
                    logprobs[row] = _logprob(tokens[row], asked)
            start += count
        not_finite = self._make_not_finite(plan, strays) if self.not_finite_rate > 0 else {}
        is_finite = self._all_finite[:num_rows] if num_rows <= len(self._all_finite) else np.ones(num_rows, np.bool_)
        if self.not_finite_rate > 0 and (not_finite or strays):  # what strays compute may be anything
            is_finite = np.array([row not in not_finite and row not in strays for row in range(num_rows)])
        result = StepResult(
            step_id=plan.step_id,
            slots=plan.slots,
            uses=plan.uses,
            tokens=np.array(tokens, dtype=np.int32),
            is_finite=is_finite,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            pooled=pooled,
        )
        step = FakeStep(result, num_polls=1 if self._is_async else 0, read=reads, written=writes)
        self._open = [*self.open_steps, step]
        if len(plan.grammar_rows):
            row_totals = dict(zip(np.flatnonzero(plan.samples).tolist(), totals, strict=True))
            step.on_choose = lambda masks: self._choose(plan, result, row_totals, masks)
        if fault_at == "collect":
            step.fault = lambda: self._fail(plan)
        if not_finite:
            step.on_collect = lambda: self._end_requests_of(not_finite)
        return step

    def _choose(self, plan: StepPlan, result: StepResult, totals: dict[int, int], masks: TokenMasks) -> None:
        """Choose the tokens of the grammar rows anew, of those that their masks allow."""
        assert masks.rows.tolist() == plan.grammar_rows.tolist(), "the masks are those of other rows"
        for row, words in zip(masks.rows.tolist(), masks.words, strict=True):
            slot = int(plan.slots[row])
            assignment, allowed = self._slots[slot], tokens_of(words, self._vocab_size)
            if len(allowed) == self._vocab_size:  # the token that was chosen without a mask stays
                continue
            if plan.num_outputs[row] < assignment.sampling.min_new_tokens:
                allowed = [token for token in allowed if token not in assignment.stop_token_ids] or allowed
            token = choose_from(totals[row], allowed, favourites=list(assignment.sampling.logit_bias or ()))
            result.tokens[row] = self._newest[slot] = token
            if row in result.logprobs and assignment.logprobs is not None:
                result.logprobs[row] = _logprob(token, assignment.logprobs)

    def recover(self) -> None:
        """Writes of the failed step stay. Until now it may have run, so its pages are still in use."""
        failed, self._failed = self._failed, []
        for pages in failed:
            demand(not self.is_any_free(pages), "pages_outlive_steps", "a page is free that a failed step may write")

    def _take_fault(self) -> str | None:
        fault, self.next_fault = self.next_fault, None
        if self.fault_rate > 0 and self._chance.random() < self.fault_rate:
            return self._chance.choice(["launch", "collect"])
        return fault

    def _make_not_finite(self, plan: StepPlan, strays: set[int]) -> dict[int, tuple[int, int]]:
        """Choose rows with logits that are not finite, and make their KV invalid. Returns slot and use by row."""
        rows = [row for row in np.flatnonzero(plan.samples).tolist() if self._chance.random() < self.not_finite_rate]
        rows = [row for row in rows if row not in strays]
        for row in rows:
            slot, first = int(plan.slots[row]), int(plan.num_computed[row])
            self._garble(slot, first, int(plan.num_tokens[row]))
            if self.audit is not None:
                self.audit.invalidated(slot)
        return {row: (int(plan.slots[row]), int(plan.uses[row])) for row in rows}

    def _end_requests_of(self, not_finite: dict[int, tuple[int, int]]) -> None:
        """Report the failure of the requests that are still in the slots of these rows."""
        if self.audit is not None:
            self.audit.failed({slot for slot, use in not_finite.values() if self._uses[slot] == use})

    def _garble(self, slot: int, first: int, count: int) -> None:
        at = np.arange(first, first + count)
        pages = self._tables[slot][at // self._page_size]
        self._flat["canary"][pages * self._page_size + at % self._page_size] ^= np.uint64(0x5A5A)

    def _fail(self, plan: StepPlan) -> None:
        """Make the step's writes invalid in slots that still have the same request, and raise."""
        own = plan.uses == np.array(self._uses)[plan.slots]
        for slot, first, count in zip(plan.slots[own], plan.num_computed[own], plan.num_tokens[own], strict=True):
            self._garble(int(slot), int(first), int(count))
        self._failed = [self._tables[slot, : self._num_mapped[slot]].copy() for slot in plan.slots[own].tolist()]
        if self.audit is not None:
            self.audit.failed(set(plan.slots[own].tolist()))
        raise StepFault(f"step {plan.step_id}")

    def _apply_changes(self, plan: StepPlan) -> None:
        slots = plan.slots.tolist() if plan.assignments else []
        for assignment in plan.assignments:
            slot = assignment.slot
            self._slots[slot] = assignment
            self._uses[slot] = assignment.use
            self._tables[slot] = -1
            self._num_mapped[slot] = 0
            if self.audit is not None:
                num_cached = int(plan.num_computed[slots.index(slot)])
                self._origins[slot] = self.audit.entered(assignment, num_cached)
        for update in plan.page_updates:
            table = self._tables[update.slot]
            table[update.first : update.first + len(update.pages)] = update.pages
            first_unmapped = (table < 0).tobytes().find(1)
            self._num_mapped[update.slot] = len(table) if first_unmapped < 0 else first_unmapped
            if self.audit is not None:
                self.audit.pages_changed(update.slot, update.first, update.pages)

    def _copy_pages(self, plan: StepPlan, taken: list[Records], *, birth: int) -> dict[int, int]:
        """Write what the copies have `taken` to their targets. Returns the source by slot.

        Copied tokens keep their birth, since a store must not get KV from before its flush.
        """
        sources: dict[int, int] = {}
        for copy, page in zip(plan.page_copies, taken, strict=True):
            slot = next(update.slot for update in plan.page_updates if copy.target in update.pages)
            sources[slot] = copy.source
            if self.audit is not None:
                self.audit.copied(slot, copy.source, page[: copy.num_tokens])
            index = self._tables[slot].tolist().index(copy.target)
            page["sequence"] = self._origins[slot][1]
            page["position"] = np.arange(index * self._page_size, (index + 1) * self._page_size)
            page["retired"] = 0
            self.kv[copy.target] = page
            self.copied_at[copy.target] = birth
        return sources

    def _compute(self, slot: int, first: int, tokens: list[int], *, birth: int) -> tuple[PageIds, bytes]:
        """Write the KV of `tokens` from position `first` on. Returns the pages, and all KV as read back."""
        length, size = first + len(tokens), self._page_size
        num_pages = -(-length // size)
        is_mapped = num_pages <= self._num_mapped[slot]
        assert is_mapped, "a token has no page to be written to, or a position to be read has none"
        pages = self._tables[slot, :num_pages].copy()
        ids = pages.tolist()
        before = START
        if first:
            place = ids[(first - 1) // size] * size + (first - 1) % size
            before = int.from_bytes(self._bytes[place * PACKED.size : place * PACKED.size + 8], "little")
        assert before != _UNWRITTEN, "KV is read that nothing has written"
        namespace, sequence = self._origins[slot]
        if NEWEST_TOKEN in tokens:
            tokens[:] = [self._newest[slot] if token == NEWEST_TOKEN else token for token in tokens]
        adapter = self._slots[slot].adapter
        if adapter:
            namespace = with_adapter(namespace, self.adapters.content_of(adapter))
        written = next_canaries(before, tokens, origin(self.weights.current, namespace))
        for position, canary in enumerate(written, first):
            place = ids[position // size] * size + position % size
            PACKED.pack_into(self._bytes, place * PACKED.size, canary, birth, 0, 0, sequence, position)
        self._pages.take(pages, axis=0, out=self._taken[:num_pages], mode="clip")  # "raise" would copy them once more
        return pages, self._taken_canaries[:num_pages].tobytes()[: 8 * length]

    def _total(self, slot: int, read: bytes) -> int:
        """`total_of` what a slot reads. As mostly that is what it read last and one position more."""
        known, total = self._totals[slot]
        if len(read) == len(known) + 8 and read.startswith(known):
            total += int.from_bytes(read[-8:], "little") * (2 * (len(known) // 8) + 1)
        else:
            total = total_of(np.frombuffer(read, dtype=np.uint64))
        self._totals[slot] = read, total
        return total

    def _pooled(self, plan: StepPlan, row: int, read: bytes) -> dict[int, npt.NDArray[np.floating]]:
        slot, num_tokens = self._slots[int(plan.slots[row])], int(plan.num_tokens[row])
        if slot.pooling == "mean":
            return {row: pooled_canaries(read[-8 * num_tokens :])}
        is_last = len(read) // 8 >= slot.num_prompt_tokens
        return {row: pooled_canaries(read[-8:])} if is_last else {}

    def _prompt_logprobs(self, plan: StepPlan, row: int) -> dict[int, tuple[TokenLogprob, ...]]:
        slot = self._slots[int(plan.slots[row])]
        if slot.logprobs is None or slot.logprobs.prompt_start < 0:
            return {}
        computed = int(plan.num_computed[row])
        first = max(computed + 1, slot.logprobs.prompt_start)
        stop = min(computed + int(plan.num_tokens[row]) + 1, slot.num_prompt_tokens)
        tokens = slot.token_ids[first:stop].tolist()
        return {row: tuple(_logprob(token, slot.logprobs) for token in tokens)} if tokens else {}


def _logprob(token_id: int, asked: LogprobParams) -> TokenLogprob:
    """All requested fields, with arbitrary numbers."""
    return TokenLogprob(
        token_id=token_id,
        logprob=-1.0,
        top_ids=tuple(range(asked.top)),
        top_logprobs=(-1.0,) * asked.top,
        ids_logprobs=(-1.0,) * len(asked.token_ids),
    )
