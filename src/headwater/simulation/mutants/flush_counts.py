"""Mutants of the counts that the metrics of flushes show, and of the generation."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from msgspec import structs

from headwater.cache.namespace import Scope
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.retirement import Retirement
from headwater.cache.tier_pages import TierPages
from headwater.control.flush import Flush
from headwater.control.operation import Moment
from headwater.control.reports.flush_counts import FlushCounts
from headwater.messages.control import FlushResult
from headwater.simulation.mutants.registry import Patch, mutant


def _counting(change: Callable[[str, str, dict[str, Any]], tuple[str, str]]) -> list[Patch]:
    """Count each flush as `change(mode, outcome, fields)` says, which may change the fields as well."""
    right: Any = FlushCounts.ended

    def ended(self: FlushCounts, mode: str, outcome: str, **fields: Any) -> None:
        right(self, *change(mode, outcome, fields), **fields)

    return [(FlushCounts, "ended", ended)]


@mutant(profile="flush")
def all_flushes_count_as_idle() -> list[Patch]:
    """The metrics count every flush under the mode `idle`."""
    return _counting(lambda mode, outcome, fields: ("idle", outcome))


@mutant(profile="flush")
def cancelled_flushes_count_as_expired() -> list[Patch]:
    """The metrics count a flush whose caller left as one that was not idle in time."""
    return _counting(lambda mode, outcome, fields: (mode, "expired" if outcome == "cancelled" else outcome))


@mutant(profile="flush")
def held_flushes_count_as_complete() -> list[Patch]:
    """The metrics count a drain as complete though requests still hold its pages."""
    return _counting(lambda mode, outcome, fields: (mode, "flushed" if outcome == "held" else outcome))


@mutant(profile="store", seed=4)
def unacknowledged_flushes_count_as_complete() -> list[Patch]:
    """The metrics count a flush as complete before the store has acknowledged it."""
    return _counting(lambda mode, outcome, fields: (mode, "flushed" if outcome == "store_pending" else outcome))


@mutant(profile="flush")
def dry_runs_count_as_flushes() -> list[Patch]:
    """The metrics count dry runs as flushes."""
    right = Flush._preview

    def preview(self: Flush, moment: Moment) -> FlushResult:
        self._count(moment, "flushed", {})
        return right(self, moment)

    return [(Flush, "_preview", preview)]


@mutant(profile="flush")
def refused_flushes_are_not_counted() -> list[Patch]:
    """A flush with `timeout=0` that finds the engine busy is missing in the metrics."""
    right: Any = FlushCounts.ended

    def ended(self: FlushCounts, mode: str, outcome: str, **fields: Any) -> None:
        if outcome != "expired" or fields["waited_s"] > 0:
            right(self, mode, outcome, **fields)

    return [(FlushCounts, "ended", ended)]


@mutant(profile="flush")
def waits_in_vain_are_not_summed() -> list[Patch]:
    """The seconds that a flush waited are summed only if it flushed."""

    def change(mode: str, outcome: str, fields: dict[str, Any]) -> tuple[str, str]:
        fields["waited_s"] *= outcome not in ("expired", "cancelled")
        return mode, outcome

    return _counting(change)


@mutant(profile="flush")
def waits_are_counted_one_bucket_higher() -> list[Patch]:
    """The histogram counts each wait in the bucket above its own."""
    right = FlushCounts.distributions

    def distributions(self: FlushCounts) -> list[Any]:
        return [structs.replace(each, counts=(0, *each.counts[:-1])) for each in right(self)]

    return [(FlushCounts, "distributions", distributions)]


@mutant(profile="flush")
def answers_leave_out_the_wait_after_the_cut() -> list[Patch]:
    """A drain reports that it waited for nothing, and the metrics say so too."""
    right = Flush._look_retired

    def look_retired(self: Flush, moment: Moment, done: Retirement) -> FlushResult | None:
        is_drain = self._message.mode == "drain" and not moment.has_expired
        return right(self, replace(moment, waited_s=0.0) if is_drain else moment, done)

    return [(Flush, "_look_retired", look_retired)]


@mutant(profile="flush")
def blockers_count_requests() -> list[Patch]:
    """The metrics add up the requests that a flush waited for in vain, not the flushes."""
    right: Any = FlushCounts.ended

    def ended(self: FlushCounts, mode: str, outcome: str, *, waited_s: float, blockers: dict[str, int]) -> None:
        right(self, mode, outcome, waited_s=waited_s, blockers=blockers)
        if outcome == "expired":
            self._blockers.update({name: count - 1 for name, count in blockers.items()})

    return [(FlushCounts, "ended", ended)]


@mutant(profile="flush")
def blockers_of_cancelled_flushes_count() -> list[Patch]:
    """The metrics count blockers of flushes that their caller gave up before the deadline."""
    right: Any = FlushCounts.ended

    def ended(self: FlushCounts, mode: str, outcome: str, *, waited_s: float, blockers: dict[str, int]) -> None:
        right(self, mode, outcome, waited_s=waited_s, blockers=blockers)
        if outcome == "cancelled":
            self._blockers.update(blockers.keys())

    return [(FlushCounts, "ended", ended)]


@mutant(profile="flush")
def flushes_of_nothing_make_generations() -> list[Patch]:
    """A flush that finds nothing in its scope counts as a generation."""
    right = PrefixCache.retire

    def retire(self: PrefixCache, scope: Scope) -> Retirement:
        before = self.generation
        done = right(self, scope)
        self.generation = done.generation = before + 1
        return done

    return [(PrefixCache, "retire", retire)]


@mutant(profile="flush")
def answers_name_the_generation_before() -> list[Patch]:
    """The answer of a flush names the generation that it has ended."""
    right = Flush._flushed

    def flushed(self: Flush, moment: Moment, done: Retirement, **fields: Any) -> FlushResult:
        return structs.replace(right(self, moment, done, **fields), generation=max(0, done.generation - 1))

    return [(Flush, "_flushed", flushed)]


@mutant(profile="training")
def new_weights_make_no_generation() -> list[Patch]:
    """New weights drop pages, and the generation stays as it was."""
    right = PrefixCache.retire

    def retire(self: PrefixCache, scope: Scope) -> Retirement:
        before = self.generation
        done = right(self, scope)
        if scope.other_than_weights_id is not None:
            self.generation = done.generation = before
        return done

    return [(PrefixCache, "retire", retire)]


@mutant(profile="flush")
def held_pages_count_as_free() -> list[Patch]:
    """The metrics count retired pages that requests hold as freed immediately."""
    right = TierPages.cut

    def cut(self: TierPages, nodes: Iterable[Any], retirement: Retirement) -> None:
        num_held = self.num_retired_held
        right(self, nodes, retirement)
        self.num_retired_free += self.num_retired_held - num_held
        self.num_retired_held = num_held

    return [(TierPages, "cut", cut)]
