"""The other ranks of a simulated engine: real workers over fakes of their own, which carry out the plan stream late.

A rank that is behind catches up when a step begins, since the ranks of a step wait for each other.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.cache.namespace import Tier
from headwater.cache.page_pool import Owner
from headwater.cache.prefix_cache import PrefixCache
from headwater.ranks import orders
from headwater.ranks.copier import EarlyRanksCopy, RanksCopier, RanksCopy
from headwater.ranks.plan_codec import Kind
from headwater.ranks.plan_stream import NUM_WORDS, Record
from headwater.ranks.runner import RanksRunner
from headwater.ranks.step_progress import Position, StepProgress, StepWatch
from headwater.ranks.worker import RankWorker
from headwater.scheduling.plan import SlotAssignment, StepPlan
from headwater.simulation.checks.violation import Violation, demand
from headwater.simulation.engine_shape import VOCAB_SIZE, EngineShape
from headwater.simulation.fakes.copier import FakeCopier, FakeCopy
from headwater.simulation.fakes.kv_records import Records
from headwater.simulation.fakes.runner import FakeRunner, FakeStep, check_written

_WATCH_TURNS = 20  # that a rank may be at a step
_HANG_CHANCE = 0.02  # in a turn, that a rank begins to show no steps for a while

MakeCopier = Callable[[FakeRunner, int], FakeCopier]


class MemoryStream:
    """The writing side of a plan stream (`ranks.plan_stream.PlanStream`) that keeps records for readers in place."""

    def __init__(self, readers: Sequence[deque[Record]]) -> None:
        self._readers = readers

    def write(self, kind: int, body: bytes, words: tuple[int, ...] = ()) -> None:
        self.write_parts(kind, (body,), num_bytes=len(body), words=words)

    def write_parts(self, kind: int, parts: Sequence[Any], *, num_bytes: int, words: tuple[int, ...]) -> None:
        body = b"".join(parts)
        assert len(body) == num_bytes
        filled = (*words, *(0,) * (NUM_WORDS - len(words)))
        for reader in self._readers:
            reader.append(Record(kind, filled, np.frombuffer(body, dtype=np.uint8)))


class Follower:
    """The audit of a rank (`fakes.runner.StepAudit`): it takes from rank 0 what depends on the oracle."""

    def __init__(self, rank0: FakeRunner) -> None:
        self._rank0 = rank0

    @property
    def turn(self) -> int:
        return self._rank0.audit.turn if self._rank0.audit else 0

    def failed(self, slots: set[int]) -> None: ...

    def entered(self, assignment: SlotAssignment, num_cached: int) -> tuple[str, int]:
        return self._rank0._origins[assignment.slot]

    def pages_changed(self, slot: int, first: int, pages: npt.NDArray[np.integer]) -> None: ...

    def copied(self, slot: int, source: int, read: Records) -> None: ...

    def invalidated(self, slot: int) -> None: ...

    def computed(
        self, slot: int, first: int, tokens: list[int], *, read: bytes, noise_at: int | None, is_draft: bool
    ) -> None:
        check_written(read)


class SimulatedRank:
    """One rank: a worker with a runner, a copier and meetings of its own. Polls take the place of its threads."""

    def __init__(self, rank: int, rank0: FakeRunner, *, shape: EngineShape, make_copier: MakeCopier) -> None:
        self.rank = rank
        self.records: deque[Record] = deque()  # published, not carried out
        self.reports: list[orders.Report] = []
        self._rank0 = rank0
        self._pending: list[tuple[Callable[[], bool], Callable[[], orders.Report]]] = []
        self.runner = FakeRunner(
            num_pages=shape.num_pages,
            page_size=shape.page_size,
            max_running=shape.max_running,
            vocab_size=VOCAB_SIZE,
            max_context=shape.max_context,
        )
        self.runner.audit = Follower(rank0)
        self.runner.weights.current, self.runner.weights.num_polls = shape.weights_id, 0
        self.copier = make_copier(self.runner, shape.seed + rank) if shape.num_host_pages else None
        self._worker = RankWorker(self, meetings=self, copier=self.copier, reports=self, pending=self)  # type: ignore[arg-type]

    @property
    def turn(self) -> int:
        return self._rank0.audit.turn if self._rank0.audit else 0

    @property
    def progress(self) -> StepProgress:
        return self._worker.progress

    def catch_up(self) -> None:
        while self.records:
            self.runner.weights.on_disk = self._rank0.weights.on_disk
            self.runner.adapters.on_disk = self._rank0.adapters.on_disk
            self._worker.carry_out(self.records.popleft())

    def poll(self) -> None:
        """Report what has ended."""
        ended = [item for item in self._pending if item[0]()]
        self._pending = [item for item in self._pending if item not in ended]
        self.reports += [report() for _, report in ended]

    # --- what its worker is built on -----------------------------------------------------------------

    def launch(self, plan: StepPlan) -> None:
        step: FakeStep = self.runner.launch(plan)
        step.on_choose, step.fault = None, None
        step.collect()

    @property
    def weights(self) -> object:
        return self.runner.weights

    @property
    def kv_memory(self) -> object:
        return self.runner.kv_memory

    @property
    def adapters(self) -> object:
        return self.runner.adapters

    def add(self, is_done: Callable[[], bool], report: Callable[[], orders.Report]) -> None:
        self._pending.append((is_done, report))

    def send(self, report: orders.Report) -> None:
        if isinstance(report, orders.StepFailed | orders.CommandFailed):
            raise Violation("ranks_agree", f"rank {self.rank}: {report.error}")
        self.reports.append(report)

    def abort(self, rank: int) -> None: ...

    def reset(self) -> None: ...


class WatchedSteps:
    """Shows a `StepWatch` the steps of ranks, one of which seems to hang at times: it must be found, and no other.

    Time is counted in turns. A rank that was found goes on, as after a restart.
    """

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(f"hanging ranks {seed}")
        self._watch = StepWatch(limit_s=_WATCH_TURNS)
        self._stuck: tuple[int, Position] | None = None  # a rank, and what it goes on to show
        self._until = 0
        self._since: int | None = None  # the stuck rank has steps to do

    def look(self, turn: int, num_begun: int, positions: Sequence[Position]) -> None:
        shown = list(positions)
        if self._stuck is None and self._chance.random() < _HANG_CHANCE:
            rank = self._chance.randrange(1, len(shown))
            self._stuck, self._until = (rank, shown[rank]), turn + self._chance.randint(1, 4 * _WATCH_TURNS)
            self._since = None
        if self._stuck is not None:
            rank, shown[rank] = self._stuck
            if self._since is None and shown[rank][0] < num_begun:
                self._since = turn
        found = self._watch.find(float(turn), num_begun, shown)
        stood = 0 if self._since is None else turn - self._since
        if found is not None:
            is_right = self._stuck is not None and found[0] == self._stuck[0] and stood > _WATCH_TURNS
            demand(is_right, "hangs_are_found", f"rank {found[0]} works and is taken for one that hangs")
        else:
            demand(stood <= _WATCH_TURNS + 1, "hangs_are_found", f"{self._stuck} hangs for {stood} turns unnoticed")
        if found is not None or turn >= self._until:
            self._stuck = self._since = None


class SimulatedRanks:
    """All ranks of an engine, with what the runner and the copier over ranks need of `RankProcesses`."""

    def __init__(
        self, rank0: FakeRunner, copier: FakeCopier | None, *, shape: EngineShape, make_copier: MakeCopier
    ) -> None:
        self.num_ranks = shape.num_ranks
        self.rank0, self._copier0 = rank0, copier
        self.on_copied: Callable[[orders.Copied], None] = lambda _: None
        self.on_near: Callable[[orders.Near], None] = lambda _: None
        self.on_staged: Callable[[int, orders.Staged], None] = lambda *_: None
        self.on_hashed: Callable[[int, orders.WeightsHashed], None] = lambda *_: None
        self.on_adapter_staged: Callable[[int, orders.AdapterStaged], None] = lambda *_: None
        self._chance = random.Random(shape.seed)
        self.progress = StepProgress()
        self._watched = WatchedSteps(shape.seed)
        self.others = [
            SimulatedRank(rank, rank0, shape=shape, make_copier=make_copier) for rank in range(1, self.num_ranks)
        ]
        self.stream = MemoryStream([other.records for other in self.others])
        self.runner = RanksRunner(self, processes=self, meetings=self.others[0])  # type: ignore[arg-type]

    def over_all(self, copier: FakeCopier) -> "LateCopier":
        """Copies of rank 0's copier, on all ranks."""
        return LateCopier(copier, self)  # type: ignore[arg-type]

    # --- rank 0's runner, with which the others meet in each step ------------------------------------

    def launch(self, plan: StepPlan) -> FakeStep:
        newest = list(self.rank0._newest)
        try:
            return self.rank0.launch(plan)
        finally:
            for other in self.others:
                other.runner._newest[:] = newest
                other.catch_up()

    @property
    def weights(self) -> object:
        return self.rank0.weights

    @property
    def kv_memory(self) -> object:
        return self.rank0.kv_memory

    @property
    def adapters(self) -> object:
        return self.rank0.adapters

    # --- what RankProcesses has ----------------------------------------------------------------------

    def order(self, order: orders.Order) -> None:
        self.stream.write(Kind.ORDER, orders.encode_order(order))

    def check(self) -> None:
        """No rank is lost here."""

    def reason_of(self, rank: int) -> None:
        """No step fails on another rank here."""

    def wait_until_recovered(self, recovery_id: int) -> None:
        for other in self.others:
            other.catch_up()
            other.reports.remove(orders.Recovered(recovery_id=recovery_id))

    def wait_for_weights(self, read_id: int) -> list[orders.WeightsRead]:
        found = []
        for other in self.others:
            other.catch_up()
            (report,) = [it for it in other.reports if isinstance(it, orders.WeightsRead) and it.read_id == read_id]
            other.reports.remove(report)
            found.append(report)
        return found

    # --- every turn ----------------------------------------------------------------------------------

    def begin_turn(self) -> None:
        """The last rank is late in half of the turns; the others read at once. Then reports come in."""
        for other in self.others:
            if other.copier is not None and self._copier0 is not None:  # a turn polls a restore six times
                other.copier.max_polls = 6 * self._copier0.max_polls
            if other is not self.others[-1] or self._chance.random() < 0.5:
                other.catch_up()
            other.poll()
            reports, other.reports = other.reports, []
            for report in reports:
                if isinstance(report, orders.Copied):
                    self.on_copied(report)
                elif isinstance(report, orders.Near):
                    self.on_near(report)
                elif isinstance(report, orders.Staged):
                    self.on_staged(other.rank, report)
                elif isinstance(report, orders.WeightsHashed):
                    self.on_hashed(other.rank, report)
                elif isinstance(report, orders.AdapterStaged):
                    self.on_adapter_staged(other.rank, report)
        positions = [self.progress.look(), *(other.progress.look() for other in self.others)]
        self._watched.look(self.others[0].turn, self.progress.num_begun, positions)

    def check_books(self, cache: PrefixCache) -> None:
        """Every rank knows the slots' pages as rank 0 does, and holds in each page of the tree what rank 0 holds."""
        for other in self.others:
            text = f"rank {other.rank}"
            demand(other.runner.num_steps == self.rank0.num_steps, "ranks_agree", f"{text} has computed other steps")
            demand(_have_same_tables(other.runner, self.rank0), "ranks_agree", f"{text} has other pages in a slot")
            if not other.records:
                theirs, ours = other.runner.adapters.by_slot, self.rank0.adapters.by_slot
                demand(theirs == ours, "ranks_agree", f"{text} has the adapters {theirs}, rank 0 has {ours}")
            if not other.runner.kv_memory.is_released and not self.rank0.kv_memory.is_released:
                missing = _missing_pages(self._copier0) | _missing_pages(other.copier)
                in_tree = cache.tier_pages[Tier.DEVICE].pool.pages_of(Owner.TREE)
                pages = [page for page in in_tree if page not in missing]
                _demand_same(self.rank0.kv, other.runner.kv, pages, f"{text}, device")
            if self._copier0 is not None and other.copier is not None:
                pages = cache.tier_pages[Tier.HOST].pool.pages_of(Owner.TREE)
                _demand_same(self._copier0.host, other.copier.host, pages, f"{text}, host")


class LateCopy(RanksCopy):
    """A copy on all ranks, whose rank 0 ends last: the checks of an engine look at rank 0's copies."""

    def __init__(self, own: FakeCopy, num_others: int) -> None:
        super().__init__(own, num_others)
        self._copy = own

    def is_done(self) -> bool:
        if self.num_missing:
            self._copy.delay(1)
        return self._copy.is_done() and super().is_done()


class LateEarlyCopy(LateCopy, EarlyRanksCopy):
    """The same of a restore that is readable before its end."""

    def __init__(self, own: FakeCopy, num_others: int, announce: Callable[[], None]) -> None:
        EarlyRanksCopy.__init__(self, own, num_others, announce)
        self._copy = own


class LateCopier(RanksCopier):
    make_copy, make_early_copy = LateCopy, LateEarlyCopy


def _missing_pages(copier: FakeCopier | None) -> set[int]:
    """Device pages that restores have not brought yet."""
    if copier is None:
        return set()
    return set().union(*(copy.missing_pages for copy in copier.open_copies if copy.kind == "restore"))


def _have_same_tables(left: FakeRunner, right: FakeRunner) -> bool:
    """Whether every slot has the same pages and the same use in both."""
    return left._uses == right._uses and left._tables.tobytes() == right._tables.tobytes()


def _demand_same(left: Records, right: Records, pages: list[int], where: str) -> None:
    is_same = left["canary"][pages].tobytes() == right["canary"][pages].tobytes()
    demand(is_same, "ranks_agree", f"{where}: a page of the tree holds other KV than on rank 0")
