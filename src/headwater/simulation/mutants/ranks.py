"""Mutants of ranks: one that misses or repeats a command, and an engine that counts a rank twice."""

from collections.abc import Sequence

from msgspec import structs

from headwater.ranks import orders
from headwater.ranks.copier import EarlyRanksCopy, RanksCopier
from headwater.ranks.plan_codec import Kind
from headwater.ranks.plan_stream import Record
from headwater.ranks.step_progress import Position, StepWatch
from headwater.ranks.worker import RankWorker
from headwater.scheduling.plan import StepPlan
from headwater.simulation.fakes.ranks import SimulatedRank
from headwater.simulation.mutants.registry import Patch, mutant


@mutant(profile="ranks")
def ranks_skip_page_copies() -> list[Patch]:
    """A rank does not copy the page that a hit ends in."""
    right = SimulatedRank.launch

    def launch(self: SimulatedRank, plan: StepPlan) -> None:
        right(self, structs.replace(plan, page_copies=()))

    return [(SimulatedRank, "launch", launch)]


@mutant(profile="ranks")
def ranks_keep_retired_pages() -> list[Patch]:
    """A rank does not learn that a slot's pages are others: it goes on reading what a flush may have retired."""
    right = SimulatedRank.launch

    def launch(self: SimulatedRank, plan: StepPlan) -> None:
        entered = {assignment.slot for assignment in plan.assignments}
        known = tuple(update for update in plan.page_updates if update.first == 0 and update.slot in entered)
        right(self, structs.replace(plan, page_updates=known) if len(plan.page_updates) > 1 else plan)

    return [(SimulatedRank, "launch", launch)]


@mutant(profile="ranks")
def ranks_apply_a_plan_twice() -> list[Patch]:
    """A rank carries out each plan twice."""
    right = RankWorker.carry_out

    def carry_out(self: RankWorker, record: Record) -> bool:
        if record.kind == Kind.STEP and not record.words[7]:  # without assignments, which come once
            right(self, record)
        return right(self, record)

    return [(RankWorker, "carry_out", carry_out)]


@mutant(profile="ranks", seed=3)
def copies_of_a_rank_count_twice() -> list[Patch]:
    """A rank's report of a copy, discarded or not, counts as those of two ranks."""
    right = RanksCopier._take

    def take(self: RanksCopier, report: orders.Copied) -> None:
        if report.copy_id not in self._copies:
            return
        right(self, report)
        if report.copy_id in self._copies:
            right(self, report)

    return [(RanksCopier, "_take", take)]


@mutant(profile="ranks")
def ranks_skip_restores() -> list[Patch]:
    """A rank reports a restore as done that it has not carried out."""
    right = RankWorker._copy

    def copy(self: RankWorker, record: Record) -> None:
        if record.kind == Kind.RESTORE:
            done = orders.Copied(copy_id=record.words[0], has_failed=False, took_s=0.0)
            self._pending.add(lambda: True, lambda: done)
        else:
            right(self, record)

    return [(RankWorker, "_copy", copy)]


@mutant(profile="ranks")
def ranks_keep_old_weights() -> list[Patch]:
    """A rank does not swap in new weights."""
    right = RankWorker._obey

    def obey(self: RankWorker, order: orders.Order) -> bool:
        if isinstance(order, orders.SwapWeights):
            return True
        return right(self, order)

    return [(RankWorker, "_obey", obey)]


@mutant(profile="ranks")
def ranks_that_hang_go_unnoticed() -> list[Patch]:
    """The watch ignores a rank whose steps do not end."""

    def find(self: StepWatch, now_s: float, num_begun: int, positions: Sequence[Position]) -> None:
        return None

    return [(StepWatch, "find", find)]


@mutant(profile="ranks")
def ranks_without_steps_seem_to_hang() -> list[Patch]:
    """The watch counts the time in which there was no step to do."""
    right = StepWatch.find

    def find(self: StepWatch, now_s: float, num_begun: int, positions: Sequence[Position]) -> tuple[int, str] | None:
        return right(self, now_s, num_begun + 1, positions)

    return [(StepWatch, "find", find)]


@mutant(profile="ranks")
def ranks_read_restores_that_others_have_not_begun() -> list[Patch]:
    """A restore is readable as soon as it is on rank 0."""

    def is_readable(self: EarlyRanksCopy, *, is_alone: bool) -> bool:
        if not self._is_found and self._arriving.is_near(is_alone=is_alone):
            self._announce()
            self._arriving.begin_reading()
            self._is_found = True
        return self._is_found

    return [(EarlyRanksCopy, "is_readable", is_readable)]


@mutant(profile="ranks")
def ranks_do_not_wait_for_arriving_pages() -> list[Patch]:
    """A rank does not learn that steps read a restore before its end."""
    right = RankWorker._carry_out

    def carry_out(self: RankWorker, record: Record) -> bool:
        return record.kind == Kind.READ_EARLY or right(self, record)

    return [(RankWorker, "_carry_out", carry_out)]
