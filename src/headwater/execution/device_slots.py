"""The state of each slot that stays on the GPU between steps: page table, newest token, slot of its adapter."""

from collections.abc import Sequence

import numpy as np
import torch

from headwater.devices.cuda.kernels.scatter import write_entries
from headwater.execution.staging import Ints, StagingRing
from headwater.scheduling.plan import NEWEST_TOKEN, PageUpdate, SlotAssignment, StepPlan


class DeviceSlots:
    """Page tables, newest tokens and adapters of `max_running` slots, and of one more slot for padding.

    Only changed entries of the tables are sent. A step reads tables and tokens as the previous steps left them,
    because all of them run in the order of one stream.
    """

    def __init__(self, device: torch.device, *, max_running: int, max_pages: int) -> None:
        self.padding_slot = max_running
        self.tables = torch.zeros((max_running + 1, max_pages), dtype=torch.int32, device=device)
        self.newest = torch.zeros(max_running + 1, dtype=torch.int32, device=device)
        self.adapters = torch.zeros(max_running + 1, dtype=torch.int32, device=device)
        self._adapters = np.zeros(max_running, dtype=np.int32)  # the same on the host
        self._ring = StagingRing(device, num_ints=1 << 16)
        self._assignments: list[SlotAssignment | None] = [None] * max_running

    def apply(self, plan: StepPlan) -> None:
        """Apply the plan's new assignments, pages, and the newest tokens that it names."""
        for assignment in plan.assignments:
            self._assignments[assignment.slot] = assignment
        changed = {it.slot: it.adapter for it in plan.assignments if it.adapter != self._adapters[it.slot]}
        if changed:
            at, values = (np.array(list(it), dtype=np.int32) for it in (changed.keys(), changed.values()))
            self._adapters[at] = values
            write_entries(self.adapters, *self._ring.stage((at, values)))
        if plan.page_updates:
            write_entries(self.tables, *self._ring.stage(self._entries(plan.page_updates)))
        self._take_named(plan)

    def _take_named(self, plan: StepPlan) -> None:
        """A slot that has had a draft may hold a token that did not count. Drafts bring their tokens themselves."""
        token_ids = plan.token_ids[: plan.num_decodes]
        is_named = token_ids != NEWEST_TOKEN
        if not is_named.any():
            return
        named = np.flatnonzero(is_named & ~plan.is_drafted)
        if len(named):
            write_entries(self.newest, *self._ring.stage((plan.slots[named], token_ids[named])))

    def has_adapters(self, slots: Ints) -> bool:
        """Whether a request in one of these slots has an adapter."""
        return bool(self._adapters[slots].any())

    def assignment(self, slot: int, use: int) -> SlotAssignment:
        """The slot's assignment, which the plan's use count must match."""
        assignment = self._assignments[slot]
        assert assignment is not None and assignment.use == use, f"slot {slot} has no use {use}"
        return assignment

    def _entries(self, updates: Sequence[PageUpdate]) -> tuple[Ints, Ints]:
        """(index into the flat tables, page) of every changed entry; the later one if two updates change an entry."""
        max_pages = self.tables.shape[1]
        at, pages = [], []
        for update in updates:
            end = update.first + len(update.pages)
            assert end <= max_pages, f"slot {update.slot}: page table too short for {end} pages"
            first = update.slot * max_pages + update.first
            at.append(np.arange(first, first + len(update.pages), dtype=np.int32))
            pages.append(update.pages)
        all_at, all_pages = np.concatenate(at), np.concatenate(pages)
        if len({update.slot for update in updates}) < len(updates):
            all_at, last = np.unique(all_at[::-1], return_index=True)
            all_pages = all_pages[::-1][last]
        return all_at, all_pages
