"""A rank process at work: it carries out the commands of the plan stream, one after another, until the stream ends."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from headwater.cache.copier import CopyHandle, PageCopier
from headwater.control.ports import (
    AdaptersPort,
    KvMemoryPort,
    Staged,
    StagedHashes,
    StagedWeights,
    WeightsPort,
)
from headwater.devices.rank_group import RankFailed
from headwater.messages.frames import pack_frame
from headwater.ranks import orders
from headwater.ranks.adapters import RankAdapters
from headwater.ranks.copier import ArrivingCopy
from headwater.ranks.plan_codec import Kind, read_assignment, read_copy, read_plan
from headwater.ranks.plan_stream import Record, StreamReader
from headwater.ranks.step_progress import StepProgress
from headwater.scheduling.plan import SlotAssignment, StepHandle, StepPlan

_POLL_S = 0.0005  # while copies or new weights are under way: the engine polls as often

log = logging.getLogger(__name__)


class RankRunner(Protocol):
    """What a rank computes with; its engine has the same (`engine.ports.ModelRunner`)."""

    def launch(self, plan: StepPlan) -> StepHandle: ...

    @property
    def weights(self) -> WeightsPort: ...

    @property
    def kv_memory(self) -> KvMemoryPort: ...

    @property
    def adapters(self) -> AdaptersPort | None: ...


class Meetings(Protocol):
    """The rank's group, as far as failures go (devices/cpu/ranks/group.py)."""

    @property
    def rank(self) -> int: ...

    def abort(self, rank: int) -> None:
        """Every rank that waits fails now."""
        ...

    def reset(self) -> None:
        """After a failure, while no rank computes."""
        ...


class Reports:
    """The pipe to the engine. Reports may come from any thread."""

    def __init__(self, write: Callable[[bytes], Any]) -> None:
        self._write = write
        self._lock = threading.Lock()

    def send(self, report: orders.Report) -> None:
        with self._lock:
            self._write(pack_frame(report))


class Pending(Protocol):
    """Copies and stagings under way: each is reported when it has ended."""

    def add(self, is_done: Callable[[], bool], report: Callable[[], orders.Report]) -> None: ...


class PendingInThread:
    """`Pending` for a rank process: a thread looks for ends."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports
        self._items: list[tuple[Callable[[], bool], Callable[[], orders.Report]]] = []
        self._has_items = threading.Condition()
        threading.Thread(target=self._run, name="report-ends", daemon=True).start()

    def add(self, is_done: Callable[[], bool], report: Callable[[], orders.Report]) -> None:
        with self._has_items:
            self._items.append((is_done, report))
            self._has_items.notify()

    def _run(self) -> None:
        while True:
            with self._has_items:
                self._has_items.wait_for(lambda: self._items)
                ended = [item for item in self._items if item[0]()]
                self._items = [item for item in self._items if item not in ended]
            for _, report in ended:
                self._reports.send(report())
            if not ended:
                time.sleep(_POLL_S)


class RankWorker:
    """The state of a rank between commands."""

    def __init__(
        self,
        runner: RankRunner,
        *,
        meetings: Meetings,
        copier: PageCopier | None,
        reports: Reports,
        pending: Pending | None = None,
        capture_graphs: Callable[[], None] = lambda: None,
    ) -> None:
        self._runner = runner
        self._meetings = meetings
        self._copier = copier
        self._reports = reports
        self._capture_graphs = capture_graphs
        self._pending = pending or PendingInThread(reports)
        self._assignments: list[SlotAssignment] = []  # of the step that comes next
        self.progress = StepProgress()
        self._staged: dict[int, StagedWeights] = {}
        self._hashes: dict[int, StagedHashes] = {}  # being computed
        self._adapters = RankAdapters(runner.adapters)
        self._arriving: dict[int, ArrivingCopy] = {}  # restores that are not known to have ended

    def run(self, reader: StreamReader) -> None:
        """Carry out commands until `Stop`, or until the engine is gone."""
        while (record := reader.take()) is not None and self.carry_out(record):
            pass

    def carry_out(self, record: Record) -> bool:
        """Carry out the next command. Whether to go on afterwards."""
        if record.kind == Kind.STEP:
            self._step(record)
            return True
        try:
            return self._carry_out(record)
        except Exception as error:  # the engine has carried it out, so it must know
            log.exception("a command failed")
            self._reports.send(orders.CommandFailed(error=_line(error)))
            return True

    def _step(self, record: Record) -> None:
        assignments, self._assignments = self._assignments, []
        handle = None
        self.progress.begin()
        try:
            handle = self._runner.launch(read_plan(record, assignments))
        except RankFailed:  # another rank's failure, which that rank reports
            log.debug("left step %d", record.words[0], exc_info=True)
        except Exception as error:
            log.warning("step %d failed on this rank", record.words[0], exc_info=error)
            self._reports.send(orders.StepFailed(step_id=record.words[0], error=_line(error)))
            self._meetings.abort(self._meetings.rank)
        self.progress.launched(handle)

    def _carry_out(self, record: Record) -> bool:
        match record.kind:
            case Kind.ASSIGN:
                self._assignments.append(read_assignment(record))
            case Kind.OFFLOAD | Kind.RESTORE:
                self._copy(record)
            case Kind.READ_EARLY:
                if (arriving := self._arriving.get(record.words[0])) is not None:  # else it has ended since
                    arriving.begin_reading()
            case Kind.ORDER:
                return self._obey(orders.decode_order(record.body.data))
            case _:
                raise ValueError(f"unknown command {record.kind}")
        return True

    def _copy(self, record: Record) -> None:
        copy_id, sources, targets = read_copy(record)
        assert self._copier is not None, "a copy without a host tier"
        start = self._copier.offload if record.kind == Kind.OFFLOAD else self._copier.restore
        handle: CopyHandle = start(sources, targets)
        if record.kind == Kind.RESTORE and isinstance(handle, ArrivingCopy):
            self._arriving[copy_id] = handle
            for is_alone in (True, False):
                self._pending.add(
                    lambda is_alone=is_alone: handle.is_near(is_alone=is_alone) or handle.is_done(),
                    lambda is_alone=is_alone: _near(copy_id, handle, is_alone),
                )
        self._pending.add(handle.is_done, lambda: self._end(copy_id, handle))

    def _end(self, copy_id: int, handle: CopyHandle) -> orders.Copied:
        """Called where ends are looked for, after what was added before."""
        self._arriving.pop(copy_id, None)
        return orders.Copied(copy_id=copy_id, has_failed=handle.has_failed, took_s=handle.took_s)

    def _obey(self, order: orders.Order) -> bool:
        weights = self._runner.weights
        match order:
            case orders.Stop():
                return False
            case orders.CaptureGraphs():
                self._capture_graphs()
            case orders.StageWeights():
                self._stage(order.staging_id, weights.stage(order.path, order.load_format))
            case orders.StageReceived():
                self._stage(order.staging_id, weights.stage_received(order.path, order.weights_id))
            case orders.ReloadWeights():
                self._stage(order.staging_id, weights.reload(accepts_changes=order.accepts_changes))
            case orders.AbandonWeights():
                of_both: dict[int, Staged] = {**self._staged, **self._hashes}
                if (staged := of_both.get(order.staging_id)) is not None:  # else it was refused here, or has ended
                    staged.abandon()
                self._staged.pop(order.staging_id, None)
            case orders.SwapWeights():
                weights.swap(self._staged.pop(order.staging_id))
            case orders.StageAdapter():
                self._pending.add(*self._adapters.stage(order))
            case orders.AbandonAdapter():
                self._adapters.abandon(order)
            case orders.PlaceAdapter():
                self._adapters.place(order)
            case orders.ClearAdapter():
                self._adapters.clear(order)
            case orders.ReadWeights():
                self._reports.send(self._read(order))
            case orders.HashWeights():
                self._hash(order.staging_id, weights.hash())
            case orders.ReleaseWeights():
                weights.release()
            case orders.ReleaseKv():
                self._runner.kv_memory.release()
            case orders.ResumeKv():
                self._runner.kv_memory.resume()
            case orders.Recover():
                self._assignments.clear()
                self._meetings.reset()
                self._reports.send(orders.Recovered(recovery_id=order.recovery_id))
            case _:
                raise ValueError(f"{type(order).__name__} at the wrong time")
        return True

    def _read(self, order: orders.ReadWeights) -> orders.WeightsRead:
        try:
            _, part = self._runner.weights.part(order.name, order.num_values)
        except Exception as error:  # noqa: BLE001  it concerns nothing but the answer
            return orders.WeightsRead(read_id=order.read_id, error=_line(error))
        return orders.WeightsRead(read_id=order.read_id, shape=part.shape, values=part.tobytes())

    def _hash(self, staging_id: int, hashes: StagedHashes) -> None:
        self._hashes[staging_id] = hashes

        def report() -> orders.WeightsHashed:
            self._hashes.pop(staging_id, None)
            error = hashes.error()
            found = {} if error is not None else hashes.found()
            return orders.WeightsHashed(staging_id=staging_id, error=error, hashes=found)

        self._pending.add(hashes.is_ready, report)

    def _stage(self, staging_id: int, staged: StagedWeights) -> None:
        self._staged[staging_id] = staged
        self._pending.add(staged.is_ready, lambda: self._report_of(staging_id, staged))

    def _report_of(self, staging_id: int, staged: StagedWeights) -> orders.Staged:
        error, weights_id = staged.error(), ""
        if error is not None:
            self._staged.pop(staging_id, None)
        elif staging_id not in self._staged:  # abandoned meanwhile: nothing waits for the report
            error = "given up"
        else:
            weights_id = staged.weights_id
        return orders.Staged(staging_id=staging_id, error=error, weights_id=weights_id, has_changed=staged.has_changed)


def _near(copy_id: int, handle: CopyHandle, is_alone: bool) -> orders.Near:
    has_failed = handle.is_done() and handle.has_failed
    return orders.Near(copy_id=copy_id, is_alone=is_alone, has_failed=has_failed)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
