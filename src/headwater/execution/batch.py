"""The CPU runner's state of each slot between steps, and the inputs that it makes of a plan."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.adapters.tiles import NO_ADAPTERS, AdapterTiles, adapter_tiles
from headwater.devices.cpu.attention_kernels import BLOCK_KEYS, WorkList
from headwater.devices.cpu.program import StepArrays
from headwater.scheduling.plan import NEWEST_TOKEN, SlotAssignment, StepPlan

_SPARE_PAGES = 32  # columns that page tables have for the next tokens


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one forward pass. T tokens, R rows as in the plan; row r has those between its query_starts."""

    token_ids: npt.NDArray[np.int32]  # [T], no NEWEST_TOKEN left
    positions: npt.NDArray[np.int32]  # [T]
    query_starts: npt.NDArray[np.int32]  # [R + 1]
    context_lens: npt.NDArray[np.int32]  # [R], the tokens of this step included
    page_tables: npt.NDArray[np.int32]  # [R, at least the pages of the longest context]
    adapters: AdapterTiles = NO_ADAPTERS

    @property
    def last_tokens(self) -> npt.NDArray[np.int32]:
        """Index of each row's last token among the T. [R]"""
        return self.query_starts[1:] - 1


class SlotTable:
    """Page tables, newest tokens and assignments of all slots. The runner owns them, and only plans change them."""

    def __init__(
        self, *, max_running: int, max_pages: int, page_size: int, newest: npt.NDArray[np.int32] | None = None
    ) -> None:
        """`newest` is the memory of the newest tokens, where several ranks share it: int32[max_running]."""
        self.page_size = page_size
        self._page_tables = np.zeros((max_running, max_pages), dtype=np.int32)
        self._newest_tokens = np.empty(max_running, dtype=np.int32) if newest is None else newest
        self._newest_tokens[:] = NEWEST_TOKEN
        self._assignments: list[SlotAssignment | None] = [None] * max_running
        self._adapters = np.zeros(max_running, dtype=np.int32)

    def apply(self, plan: StepPlan) -> None:
        """Apply the plan's new assignments and pages."""
        for assignment in plan.assignments:
            self._assignments[assignment.slot] = assignment
            self._newest_tokens[assignment.slot] = NEWEST_TOKEN
            self._adapters[assignment.slot] = assignment.adapter
        for update in plan.page_updates:
            end = update.first + len(update.pages)
            assert end <= self._page_tables.shape[1], f"slot {update.slot}: page table too short for {end} pages"
            self._page_tables[update.slot, update.first : end] = update.pages

    def assignment(self, slot: int, use: int) -> SlotAssignment:
        """The slot's assignment, which the plan's use count must match."""
        assignment = self._assignments[slot]
        assert assignment is not None and assignment.use == use, f"slot {slot} has no use {use}"
        return assignment

    def assignments(self, plan: StepPlan, rows: Sequence[int]) -> list[SlotAssignment]:
        """The assignments of some rows of a plan."""
        slots, uses = plan.slots.tolist(), plan.uses.tolist()
        return [self.assignment(slots[row], uses[row]) for row in rows]

    def page_tables(self, slots: npt.NDArray[np.int32], num_pages: int) -> npt.NDArray[np.int32]:
        """A copy of the first pages of some slots. [len(slots), num_pages]; fewer if no table is that long"""
        return np.ascontiguousarray(self._page_tables[slots, :num_pages])

    def adapters(self, plan: StepPlan) -> AdapterTiles:
        """The plan's tokens that have adapters."""
        of_rows = self._adapters[plan.slots]
        return adapter_tiles(np.repeat(of_rows, plan.num_tokens)) if of_rows.any() else NO_ADAPTERS

    def newest(self, plan: StepPlan, out: npt.NDArray[np.int32]) -> None:
        """Write the tokens of a plan of decodes to `out`: those it names, and the newest tokens of the other slots."""
        self._newest_tokens.take(plan.slots, out=out)
        np.copyto(out, plan.token_ids, where=plan.token_ids != NEWEST_TOKEN)
        assert out.min() >= 0, "the plan asks for the newest token of a slot that has sampled none"

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
        num_pages = -(-int(context_lens.max()) // self.page_size)
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            query_starts=np.concatenate((np.zeros(1, dtype=np.int32), ends)),
            context_lens=context_lens.astype(np.int32),
            page_tables=self.page_tables(plan.slots, num_pages),
            adapters=self.adapters(plan),
        )

    def set_newest(self, slots: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32]) -> None:
        self._newest_tokens[slots] = tokens


class MakeWork(Protocol):
    def __call__(
        self,
        query_starts: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        page_tables: npt.NDArray[np.int32],
        *,
        num_decodes: int,
    ) -> WorkList: ...


class DecodeBatch:
    """The arrays of steps of decodes alone. While the same requests decode, a step changes a few numbers in place.

    The attention's work changes only when a row begins a block of keys, or when another page takes a page's place.
    """

    def __init__(self, plan: StepPlan, slots: SlotTable, *, kv: npt.NDArray[np.uint8], make_work: MakeWork) -> None:
        """`make_work` makes the work of a step's attention. The slots have the plan."""
        self._table = slots
        self._make_work = make_work
        self._page_size = slots.page_size
        self._key = _rows_of(plan)
        self._row_of = {slot: row for row, slot in enumerate(plan.slots.tolist())}
        num_rows = plan.num_rows
        none = np.zeros(0, dtype=np.int32)
        adapters = slots.adapters(plan)
        self._blocks = b""
        self._arrays = StepArrays(
            token_ids=np.zeros(num_rows, dtype=np.int32),
            positions=np.zeros(num_rows, dtype=np.int32),
            query_starts=np.arange(num_rows + 1, dtype=np.int32),
            context_lens=np.zeros(num_rows, dtype=np.int32),
            page_tables=np.zeros((num_rows, 0), dtype=np.int32),
            selected=np.arange(num_rows, dtype=np.int32),
            kv=kv,
            chunks=np.zeros(0, dtype=np.int64),
            queries_per_chunk=1,
            partial_slots=none,
            next_sharing=none,
            num_decodes=num_rows,
            adapter_rows=adapters.rows,
            adapter_tiles=adapters.tiles,
        )

    def continues(self, plan: StepPlan) -> bool:
        """Whether `plan` has the rows of this batch."""
        return _rows_of(plan) == self._key

    def step(self, plan: StepPlan) -> StepArrays:
        """The step of a plan that the slots have. Valid until the next step."""
        positions = self._arrays.positions
        positions[:] = plan.num_computed
        np.add(positions, 1, out=self._arrays.context_lens)
        self._table.newest(plan, self._arrays.token_ids)
        has_other_pages = self._update_pages(plan)
        blocks = (positions // BLOCK_KEYS).tobytes()
        if has_other_pages or blocks != self._blocks:
            self._blocks = blocks
            self._replace_work()
        return self._arrays

    def _update_pages(self, plan: StepPlan) -> bool:
        """Bring the page tables up to date. True if a page of earlier tokens may be another one now."""
        tables = self._arrays.page_tables
        num_pages = int(plan.num_computed.max()) // self._page_size + 1
        if num_pages > tables.shape[1]:
            tables = self._table.page_tables(plan.slots, num_pages + _SPARE_PAGES)
            self._arrays = replace(self._arrays, page_tables=tables)
            return True
        has_other_pages = False
        for update in plan.page_updates:
            row = self._row_of[update.slot]
            tables[row, update.first : update.first + len(update.pages)] = update.pages
            has_other_pages |= update.first * self._page_size < plan.num_computed[row]
        return bool(has_other_pages)

    def _replace_work(self) -> None:
        arrays = self._arrays
        work = self._make_work(
            arrays.query_starts, arrays.context_lens, arrays.page_tables, num_decodes=arrays.num_decodes
        )
        self._arrays = replace(
            arrays,
            chunks=work.chunks,
            queries_per_chunk=work.queries_per_chunk,
            partial_slots=work.partial_slots,
            next_sharing=work.next_sharing,
        )


def _rows_of(plan: StepPlan) -> tuple[bytes, bytes]:
    return plan.slots.tobytes(), plan.uses.tobytes()
