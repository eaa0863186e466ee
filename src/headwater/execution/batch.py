"""The CPU runner's state of each slot between steps, and the flat inputs that it makes of a plan."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headwater.scheduling.plan import NEWEST_TOKEN, SlotAssignment, StepPlan


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one forward pass. T tokens, R rows as in the plan; row r has those between its query_starts."""

    token_ids: npt.NDArray[np.int32]  # [T], no NEWEST_TOKEN left
    positions: npt.NDArray[np.int32]  # [T]
    query_starts: npt.NDArray[np.int32]  # [R + 1]
    context_lens: npt.NDArray[np.int32]  # [R], the tokens of this step included
    page_tables: npt.NDArray[np.int32]  # [R, pages of the longest context]

    @property
    def last_tokens(self) -> npt.NDArray[np.int32]:
        """Index of each row's last token among the T. [R]"""
        return self.query_starts[1:] - 1


class SlotTable:
    """Page tables, newest tokens and assignments of all slots. The runner owns them, and only plans change them."""

    def __init__(self, *, max_running: int, max_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._page_tables = np.zeros((max_running, max_pages), dtype=np.int32)
        self._newest_tokens = np.full(max_running, NEWEST_TOKEN, dtype=np.int32)
        self._assignments: list[SlotAssignment | None] = [None] * max_running

    def apply(self, plan: StepPlan) -> None:
        """Apply the plan's new assignments and pages."""
        for assignment in plan.assignments:
            self._assignments[assignment.slot] = assignment
            self._newest_tokens[assignment.slot] = NEWEST_TOKEN
        for update in plan.page_updates:
            end = update.first + len(update.pages)
            assert end <= self._page_tables.shape[1], f"slot {update.slot}: page table too short for {end} pages"
            self._page_tables[update.slot, update.first : end] = update.pages

    def assignment(self, slot: int, use: int) -> SlotAssignment:
        """The slot's assignment, which the plan's use count must match."""
        assignment = self._assignments[slot]
        assert assignment is not None and assignment.use == use, f"slot {slot} has no use {use}"
        return assignment

    def inputs(self, plan: StepPlan) -> StepInputs:
        """Flatten a plan, which must have been applied."""
        assert plan.num_rows and (plan.num_tokens > 0).all(), "a plan computes at least one token in every row"
        ends = np.cumsum(plan.num_tokens, dtype=np.int32)
        starts = ends - plan.num_tokens
        rows = np.repeat(np.arange(plan.num_rows), plan.num_tokens)
        positions = (np.arange(len(rows)) - starts[rows] + plan.num_computed[rows]).astype(np.int32)
        token_ids = plan.token_ids.astype(np.int32)
        is_newest = token_ids == NEWEST_TOKEN
        token_ids[is_newest] = self._newest_tokens[plan.slots[rows[is_newest]]]
        assert (token_ids >= 0).all(), "the plan asks for the newest token of a slot that has sampled none"
        context_lens = plan.num_computed + plan.num_tokens
        num_pages = -(-int(context_lens.max()) // self._page_size)
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            query_starts=np.concatenate((np.zeros(1, dtype=np.int32), ends)),
            context_lens=context_lens.astype(np.int32),
            page_tables=np.ascontiguousarray(self._page_tables[plan.slots, :num_pages]),
        )

    def set_newest(self, slots: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32]) -> None:
        self._newest_tokens[slots] = tokens
