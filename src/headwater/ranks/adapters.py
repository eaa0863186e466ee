"""LoRA adapters over ranks: each reads the files and keeps its share, and all place or clear a slot between the same
steps. All load an adapter, or none does.
"""

import itertools
from collections.abc import Callable
from typing import Any, Protocol

from headwater.control.ports import AdaptersPort, StagedAdapter
from headwater.ranks import orders
from headwater.ranks.staged import error_of_ranks


class Processes(Protocol):
    """What is needed of `processes.RankProcesses`."""

    @property
    def num_ranks(self) -> int: ...

    on_adapter_staged: Callable[[int, orders.AdapterStaged], None]

    def order(self, order: orders.Order) -> None: ...


class RanksStagedAdapter:
    """An adapter on all ranks (`control.ports.StagedAdapter`): ready when all are, refused if one refuses it."""

    def __init__(self, own: StagedAdapter, staging_id: int, processes: Processes) -> None:
        self.own = own
        self.staging_id = staging_id
        self._processes = processes
        self.reports: dict[int, orders.AdapterStaged] = {}  # by rank; the thread that reads reports fills it

    def is_ready(self) -> bool:
        return self.own.is_ready() and len(self.reports) == self._processes.num_ranks - 1

    def error(self) -> str | None:
        return error_of_ranks(
            self.own.error(),
            self.reports,
            is_same=lambda report: report.adapter_id == self.own.adapter_id,
            what="another adapter",
        )

    @property
    def adapter_id(self) -> str:
        return self.own.adapter_id

    @property
    def rank(self) -> int:
        return self.own.rank

    @property
    def num_bytes(self) -> int:
        return self.own.num_bytes

    def abandon(self) -> None:
        self._processes.order(orders.AbandonAdapter(staging_id=self.staging_id))
        self.own.abandon()


class RanksAdapters:
    """The adapters of all ranks (`control.ports.AdaptersPort`). `own` are rank 0's."""

    def __init__(self, own: AdaptersPort, processes: Processes) -> None:
        self._own = own
        self._processes = processes
        self._ids = itertools.count()
        self._staged: dict[int, RanksStagedAdapter] = {}
        processes.on_adapter_staged = self._take

    @property
    def num_slots(self) -> int:
        return self._own.num_slots

    def stage(self, path: str) -> RanksStagedAdapter:
        staging_id = next(self._ids)
        staged = self._staged[staging_id] = RanksStagedAdapter(self._own.stage(path), staging_id, self._processes)
        self._processes.order(orders.StageAdapter(staging_id=staging_id, path=path))
        return staged

    def place(self, slot: int, staged: Any) -> None:
        self._processes.order(orders.PlaceAdapter(staging_id=staged.staging_id, slot=slot))
        self._own.place(slot, staged.own)

    def clear(self, slot: int) -> None:
        self._processes.order(orders.ClearAdapter(slot=slot))
        self._own.clear(slot)

    def _take(self, rank: int, report: orders.AdapterStaged) -> None:
        """Called in the thread that reads reports."""
        staged = self._staged[report.staging_id]
        staged.reports[rank] = report
        if len(staged.reports) == self._processes.num_ranks - 1:
            del self._staged[report.staging_id]


class RankAdapters:
    """The adapters of another rank, which obeys. `own`: None where adapters are not served."""

    def __init__(self, own: AdaptersPort | None) -> None:
        self._adapters = own
        self._staged: dict[int, StagedAdapter] = {}

    def stage(self, order: orders.StageAdapter) -> tuple[Callable[[], bool], Callable[[], orders.AdapterStaged]]:
        """Begin. Returns whether it has ended, and then the report."""
        staged = self._staged[order.staging_id] = self._own.stage(order.path)
        return staged.is_ready, lambda: self._report(order.staging_id, staged)

    def abandon(self, order: orders.AbandonAdapter) -> None:
        if (staged := self._staged.pop(order.staging_id, None)) is not None:  # else it was refused here
            staged.abandon()

    def place(self, order: orders.PlaceAdapter) -> None:
        self._own.place(order.slot, self._staged.pop(order.staging_id))

    def clear(self, order: orders.ClearAdapter) -> None:
        self._own.clear(order.slot)

    @property
    def _own(self) -> AdaptersPort:
        assert self._adapters is not None, "this rank serves no adapters"
        return self._adapters

    def _report(self, staging_id: int, staged: StagedAdapter) -> orders.AdapterStaged:
        error, adapter_id = staged.error(), ""
        if error is not None:
            self._staged.pop(staging_id, None)
        elif staging_id not in self._staged:  # abandoned meanwhile: nothing waits for the report
            error = "given up"
        else:
            adapter_id = staged.adapter_id
        return orders.AdapterStaged(staging_id=staging_id, error=error, adapter_id=adapter_id)
