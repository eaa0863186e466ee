"""The runner over ranks (`engine.ports.ModelRunner`): each plan goes to the other ranks, then rank 0 computes its part.

Rank 0 computes in the engine's process, and its results are those of the step.
"""

import hashlib
import itertools
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from headwater.control.ports import AdaptersPort, KvMemoryPort, Staged, StagedHashes, StagedWeights, WeightsPort
from headwater.devices.rank_group import RankFailed
from headwater.ranks import orders
from headwater.ranks.adapters import RanksAdapters
from headwater.ranks.plan_codec import write_plan
from headwater.ranks.processes import RankProcesses
from headwater.ranks.staged import error_of_ranks
from headwater.ranks.worker import Meetings, RankRunner
from headwater.scheduling.plan import StepHandle, StepPlan, StepResult, TokenMasks

log = logging.getLogger(__name__)


class Launcher(Protocol):
    """What launches steps: a runner alone, or one with its ranks."""

    def launch(self, plan: StepPlan) -> StepHandle: ...


class RanksLauncher:
    """Launches steps on all ranks. `own` is rank 0's runner."""

    def __init__(self, own: Launcher, *, processes: RankProcesses, meetings: Meetings) -> None:
        self._own = own
        self._processes = processes
        self._meetings = meetings
        self._recovery_ids = itertools.count()

    def launch(self, plan: StepPlan) -> StepHandle:
        self._processes.check()
        progress = self._processes.progress
        progress.begin()
        write_plan(self._processes.stream, plan)
        try:
            step = self._own.launch(plan)
            progress.launched(step)
            return RanksStep(step, self)
        except Exception as error:
            progress.launched(None)
            self.raise_from(error)
            raise

    def raise_from(self, error: Exception) -> None:
        """A step raised `error` on rank 0: have the others leave it, or name the rank that failed."""
        if not isinstance(error, RankFailed):
            self._meetings.abort(0)
            return
        reason = self._processes.reason_of(error.rank)
        if reason is not None:
            raise RuntimeError(reason) from error

    def recover(self) -> None:
        """Bring all ranks to the beginning of a step. RankLost if one is lost."""
        self._processes.check()
        recovery_id = next(self._recovery_ids)
        self._meetings.abort(0)
        self._processes.order(orders.Recover(recovery_id=recovery_id))
        self._processes.wait_until_recovered(recovery_id)
        self._meetings.reset()


class RanksStep:
    """A step on all ranks (plan.StepHandle). Only rank 0 samples."""

    def __init__(self, own: StepHandle, launcher: RanksLauncher) -> None:
        self._own = own
        self._launcher = launcher

    def choose(self, masks: TokenMasks) -> None:
        self._own.choose(masks)

    def is_done(self) -> bool:
        return self._own.is_done()

    def collect(self) -> StepResult:
        try:
            return self._own.collect()
        except RankFailed as error:
            self._launcher.raise_from(error)
            raise


class RanksRunner:
    """`engine.ports.ModelRunner` over ranks. `own` is rank 0's runner with its weights and KV memory."""

    def __init__(self, own: RankRunner, *, processes: RankProcesses, meetings: Meetings) -> None:
        self._launcher = RanksLauncher(own, processes=processes, meetings=meetings)
        self.weights: WeightsPort = RanksWeights(own.weights, processes)
        self.kv_memory: KvMemoryPort = RanksKvMemory(own.kv_memory, processes)
        self.adapters: AdaptersPort | None = None
        if own.adapters is not None:
            self.adapters = RanksAdapters(own.adapters, processes)

    def launch(self, plan: StepPlan) -> StepHandle:
        return self._launcher.launch(plan)

    def recover(self) -> None:
        self._launcher.recover()


class RanksKvMemory:
    """The KV memory of all ranks (`control.ports.KvMemoryPort`)."""

    def __init__(self, own: KvMemoryPort, processes: RankProcesses) -> None:
        self._own = own
        self._processes = processes

    def release(self) -> int:
        self._processes.order(orders.ReleaseKv())
        return self._own.release() * self._processes.num_ranks

    def resume(self) -> int:
        self._processes.order(orders.ResumeKv())
        return self._own.resume() * self._processes.num_ranks


class RanksStaged:
    """New weights on all ranks (`control.ports.StagedWeights`): ready when all are, refused if one refuses them."""

    def __init__(self, own: StagedWeights, staging_id: int, processes: RankProcesses) -> None:
        self.own = own
        self.staging_id = staging_id
        self._processes = processes
        self.reports: dict[int, orders.Staged] = {}  # by rank; the thread that reads reports fills it

    def is_ready(self) -> bool:
        return self.own.is_ready() and len(self.reports) == self._processes.num_ranks - 1

    def error(self) -> str | None:
        return error_of_ranks(
            self.own.error(),
            self.reports,
            is_same=lambda report: report.weights_id == self.own.weights_id,
            what="other weights",
        )

    @property
    def weights_id(self) -> str:
        return self.own.weights_id

    @property
    def num_tensors(self) -> int:
        return self.own.num_tensors

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.own.end_ids

    @property
    def is_whole(self) -> bool:
        return self.own.is_whole

    @property
    def overwrite(self) -> None:
        return None

    @property
    def has_changed(self) -> bool:
        return self.own.has_changed or any(report.has_changed for report in self.reports.values())

    def abandon(self) -> None:
        self._processes.order(orders.AbandonWeights(staging_id=self.staging_id))
        self.own.abandon()


class RanksHashes:
    """Hashes of the weights on all ranks (`control.ports.StagedHashes`): of each tensor, of all shares of it."""

    def __init__(self, own: StagedHashes, staging_id: int, processes: RankProcesses) -> None:
        self._own = own
        self.staging_id = staging_id
        self._processes = processes
        self.reports: dict[int, orders.WeightsHashed] = {}  # by rank; the thread that reads reports fills it

    def is_ready(self) -> bool:
        return self._own.is_ready() and len(self.reports) == self._processes.num_ranks - 1

    def error(self) -> str | None:
        if (own := self._own.error()) is not None:
            return own
        return next((f"rank {rank}: {it.error}" for rank, it in sorted(self.reports.items()) if it.error), None)

    def found(self) -> dict[str, str]:
        shares = [self._own.found(), *(self.reports[rank].hashes for rank in sorted(self.reports))]
        return {name: _hash_of([share[name] for share in shares]) for name in shares[0]}

    def abandon(self) -> None:
        self._processes.order(orders.AbandonWeights(staging_id=self.staging_id))
        self._own.abandon()


class RanksWeights:
    """The weights of all ranks (`control.ports.WeightsPort`): each reads its share, and all change together."""

    def __init__(self, own: WeightsPort, processes: RankProcesses) -> None:
        self._own = own
        self._processes = processes
        self._ids = itertools.count()
        self._staged: dict[int, RanksStaged] = {}
        self._hashes: dict[int, RanksHashes] = {}
        processes.on_staged, processes.on_hashed = self._take, self._take_hashes

    def stage(self, path: str, load_format: str) -> RanksStaged:
        staging_id = next(self._ids)
        order = orders.StageWeights(staging_id=staging_id, path=path, load_format=load_format)
        return self._begin(order, self._own.stage(path, load_format), staging_id)

    def stage_received(self, path: str, weights_id: str, *, in_place: bool = False) -> StagedWeights:
        if in_place:  # it is refused in rank 0's staging, as other faults are
            return self._own.stage_received(path, weights_id, in_place=True)
        staging_id = next(self._ids)
        order = orders.StageReceived(staging_id=staging_id, path=path, weights_id=weights_id)
        return self._begin(order, self._own.stage_received(path, weights_id), staging_id)

    def overwrite(self, staged: Any) -> Staged:
        return self._own.overwrite(staged)

    def parameters(self) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
        return self._own.parameters()

    def hash(self) -> RanksHashes:
        hashes = RanksHashes(self._own.hash(), next(self._ids), self._processes)
        self._hashes[hashes.staging_id] = hashes
        self._processes.order(orders.HashWeights(staging_id=hashes.staging_id))
        return hashes

    def reload(self, *, accepts_changes: bool = False) -> RanksStaged:
        staging_id = next(self._ids)
        order = orders.ReloadWeights(staging_id=staging_id, accepts_changes=accepts_changes)
        return self._begin(order, self._own.reload(accepts_changes=accepts_changes), staging_id)

    def swap(self, staged: Any) -> None:
        self._processes.order(orders.SwapWeights(staging_id=staged.staging_id))
        self._own.swap(staged.own)

    def release(self) -> int:
        self._processes.order(orders.ReleaseWeights())
        return self._own.release() * self._processes.num_ranks

    def values(self, name: str, num_values: int) -> tuple[str, tuple[int, ...], tuple[float, ...]]:
        dtype, own = self._own.part(name, num_values)
        read_id = next(self._ids)
        self._processes.order(orders.ReadWeights(read_id=read_id, name=name, num_values=num_values))
        parts = [own]
        for rank, report in enumerate(self._processes.wait_for_weights(read_id), start=1):
            if report.error is not None:
                raise RuntimeError(f"rank {rank}: {report.error}")
            parts.append(np.frombuffer(report.values, dtype=np.float32).reshape(report.shape))
        return (dtype, *self._own.join(name, num_values, parts))

    def part(self, name: str, num_values: int) -> tuple[str, Any]:
        return self._own.part(name, num_values)

    def join(self, name: str, num_values: int, parts: Sequence[Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        return self._own.join(name, num_values, parts)

    def _begin(self, order: orders.Order, own: StagedWeights, staging_id: int) -> RanksStaged:
        staged = self._staged[staging_id] = RanksStaged(own, staging_id, self._processes)
        self._processes.order(order)
        return staged

    def _take(self, rank: int, report: orders.Staged) -> None:
        """Called in the thread that reads reports."""
        staged = self._staged[report.staging_id]
        staged.reports[rank] = report
        if len(staged.reports) == self._processes.num_ranks - 1:
            del self._staged[report.staging_id]

    def _take_hashes(self, rank: int, report: orders.WeightsHashed) -> None:
        """Called in the thread that reads reports."""
        hashes = self._hashes[report.staging_id]
        hashes.reports[rank] = report
        if len(hashes.reports) == self._processes.num_ranks - 1:
            del self._hashes[report.staging_id]


def _hash_of(shares: Sequence[str]) -> str:
    """One hash of the hashes of all shares, in the order of the ranks."""
    return hashlib.blake2b("\n".join(shares).encode(), digest_size=8).hexdigest()
