"""Steps to measure: decodes of several rows and prompt chunks, with any context, planned without a scheduler."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headwater.execution.runner import Runner
from headwater.messages.generation import SamplingParams
from headwater.scheduling.plan import NEWEST_TOKEN, PageUpdate, SlotAssignment, StepPlan

_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class StepCase:
    """A step of `num_rows` requests that have `context` computed tokens each, and compute `num_new` more."""

    num_rows: int
    context: int
    num_new: int = 1  # 1: a decode

    @classmethod
    def parse(cls, text: str) -> "StepCase":
        """`16x200`: 16 decodes with a context of 200. `512+0`: 512 prompt tokens after 0. Else ValueError."""
        for sign in ("x", "+"):
            first, found, context = text.partition(sign)
            if found and first.isdigit() and context.isdigit() and int(first) > 0:
                is_decode = sign == "x"
                return cls(int(first), int(context)) if is_decode else cls(1, int(context), int(first))
        raise ValueError(f"a case is ROWSxCONTEXT for decodes or TOKENS+CONTEXT for a prompt chunk, not {text!r}")

    @property
    def is_decode(self) -> bool:
        return self.num_new == 1

    @property
    def name(self) -> str:
        if self.is_decode:
            return f"decode, {self.num_rows} x {self.context}"
        return f"prefill, {self.num_new} after {self.context}"

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return self.num_rows * self.num_new

    @property
    def num_read(self) -> int:
        """Tokens whose keys and values the step reads, over all rows."""
        return self.num_rows * (self.context + self.num_new)

    @property
    def num_scores(self) -> int:
        """Pairs of a computed token and a token that it attends to."""
        return self.num_rows * (self.num_new * self.context + self.num_new * (self.num_new + 1) // 2)

    def num_pages(self, page_size: int) -> int:
        return self.num_rows * -(-(self.context + self.num_new) // page_size)


class StepMaker:
    """Places cases in the slots and pages of a runner. The keys and values of a context are arbitrary."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._random = np.random.default_rng(0)
        self._use = 0

    def place(self, case: StepCase) -> Callable[[], StepPlan]:
        """A function that plans the case's step, each time the same one."""
        self._use += 1
        pages_each = case.num_pages(self._runner.kv.layout.page_size) // case.num_rows
        pages = self._random.permutation(self._runner.kv.num_pages)[: case.num_rows * pages_each].astype(np.int32)
        token_ids = self._random.integers(0, self._runner.model.config.vocab_size, case.num_new).astype(np.int32)
        updates = tuple(
            PageUpdate(slot=row, first=0, pages=pages[row * pages_each : (row + 1) * pages_each])
            for row in range(case.num_rows)
        )
        assignments = tuple(
            SlotAssignment(
                slot=row,
                use=self._use,
                sampling=_GREEDY,
                token_ids=token_ids,
                num_prompt_tokens=case.num_new,
                stop_token_ids=(),
            )
            for row in range(case.num_rows)
        )
        first = self._plan(case, np.tile(token_ids, case.num_rows), assignments=assignments, updates=updates)
        if not case.is_decode:
            return lambda: first
        self._runner.launch(first).collect()  # a decode needs a previous token
        newest = np.full(case.num_rows, NEWEST_TOKEN, dtype=np.int32)
        return lambda: self._plan(case, newest)

    def _plan(
        self,
        case: StepCase,
        token_ids: npt.NDArray[np.int32],
        *,
        assignments: tuple[SlotAssignment, ...] = (),
        updates: tuple[PageUpdate, ...] = (),
    ) -> StepPlan:
        rows = case.num_rows
        return StepPlan(
            step_id=0,
            assignments=assignments,
            page_updates=updates,
            slots=np.arange(rows, dtype=np.int32),
            uses=np.full(rows, self._use, dtype=np.int64),
            num_computed=np.full(rows, case.context, dtype=np.int32),
            num_tokens=np.full(rows, case.num_new, dtype=np.int32),
            samples=np.ones(rows, dtype=np.bool_),
            token_ids=token_ids,
            num_decodes=0 if assignments else rows,
            num_outputs=np.zeros(rows, dtype=np.int32),
        )
