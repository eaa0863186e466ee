"""The promise of the flush metrics: they count the answers that callers received, and the pages that were cut."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

from headwater.messages.control import FlushCache, FlushResult
from headwater.messages.state import EngineState
from headwater.simulation.checks.cuts import Cuts
from headwater.simulation.checks.pending_calls import PendingCall
from headwater.simulation.checks.violation import demand

_MODES = ("idle", "now", "drain")
_TOLERANCE_S = 1e-6  # of sums of times


class MetricPromises:
    """Counts the answers that the clients of one engine received, and compares them with the engine's own counts.

    `report` makes the state that the metrics page shows.
    """

    def __init__(self, report: Callable[[str], EngineState], *, cuts: Cuts, now_s: Callable[[], float]) -> None:
        self._report = report
        self._cuts = cuts
        self._now_s = now_s
        self._outcomes: Counter[str] = Counter()  # by `{mode}:{outcome}`
        self._blockers: Counter[str] = Counter()
        self._waits_s: dict[str, list[float]] = {mode: [] for mode in _MODES}  # sorted only when they are compared
        self._has_news = False  # in this turn
        self._num_cuts_seen = 0

    def answered(self, call: PendingCall, answer: FlushResult) -> None:
        """A client has got the answer of its flush in this turn."""
        flush = call.message
        assert isinstance(flush, FlushCache)
        self._has_news = True
        since_s = self._now_s() - call.arrived_s
        is_right = abs(answer.waited_s - since_s) < _TOLERANCE_S
        demand(is_right, "metrics_agree", f"{flush} waited {since_s} s, its answer says {answer.waited_s} s")
        if answer.dry_run:
            return
        outcome = _outcome(call, flush, answer)
        self._outcomes[f"{flush.mode}:{outcome}"] += 1
        self._waits_s[flush.mode].append(answer.waited_s)
        if outcome in ("expired", "held"):
            self._blockers.update(answer.blockers.keys())

    def check(self) -> None:
        """At the end of a turn."""
        if not self._has_news and self._cuts.num_cuts == self._num_cuts_seen:
            return  # the case in most turns
        self._has_news, self._num_cuts_seen = False, self._cuts.num_cuts
        state = self._report("")
        counted = {name: count for name, count in state.flushes.items() if count}
        demand(counted == self._outcomes, "metrics_agree", f"counted {counted}, told {dict(self._outcomes)}")
        blockers = state.flush_blockers
        demand(blockers == self._blockers, "metrics_agree", f"counted {blockers}, told {dict(self._blockers)}")
        self._check_waits(state)
        self._check_retired(state)

    # ------------------------------------------------------------------------------------------------

    def _check_waits(self, state: EngineState) -> None:
        found = {each.labels["mode"]: each for each in state.distributions if each.name == "flush_waited_seconds"}
        demand(found.keys() == self._waits_s.keys(), "metrics_agree", f"waits of {sorted(found)}")
        for mode, waits_s in self._waits_s.items():
            waits_s.sort()
            counted, told = found[mode], sum(waits_s)
            is_sum = abs(counted.total - told) < _TOLERANCE_S * (1 + len(waits_s))
            demand(is_sum, "metrics_agree", f"{mode}: {counted.total} s counted, {told} s told")
            num_told = 0
            for bound, count in zip((*counted.bounds, float("inf")), counted.counts, strict=True):
                up_to = bisect_left(waits_s, bound) + waits_s.count(bound)
                is_right = count == up_to - num_told
                demand(is_right, "metrics_agree", f"{mode}: {count} up to {bound} s, told {up_to - num_told}")
                num_told = up_to

    def _check_retired(self, state: EngineState) -> None:
        """Pages that flushes and new weights cut out of the tree, and how often they did."""
        counted = {name: state.counters[name] for name in self._cuts.totals}
        demand(counted == self._cuts.totals, "metrics_agree", f"counted {counted}, cut {self._cuts.totals}")
        generation = self._cuts.generation
        is_right = state.generation == generation == state.counters["retirements"]
        demand(is_right, "metrics_agree", f"generation {state.generation}, by the cuts {generation}")


def _outcome(call: PendingCall, flush: FlushCache, answer: FlushResult) -> str:
    """The outcome of the answer that the client received, by its name in docs/metrics.md."""
    if not answer.success:
        if "before the engine was idle" in answer.message:
            return "cancelled"
        has_expired = round(answer.waited_s, 9) >= flush.timeout_s  # the engine compares moments, which round otherwise
        is_over = not call.is_cancelled or has_expired  # a cancel that came after the deadline
        demand(is_over, "metrics_agree", f"{flush} was cancelled after {answer.waited_s} s, and says: {answer.message}")
        return "expired"
    if answer.status == 200:
        return "flushed"
    return "held" if flush.mode == "drain" and not answer.drained else "store_pending"
