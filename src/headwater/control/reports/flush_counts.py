"""How flushes ended, for the metrics: by mode and outcome, how long they waited, and what they waited for in vain."""

from bisect import bisect_left
from collections import Counter
from typing import Literal, get_args

from headwater.messages.state import Distribution

# flushed: complete. held, store_pending: flushed, and answered before the old pages were given back, or before the
# store had acknowledged. expired: not idle in time, nothing was flushed. cancelled: by its caller, nothing was flushed.
FlushOutcome = Literal["flushed", "held", "store_pending", "expired", "cancelled"]
MODES: tuple[str, ...] = ("idle", "now", "drain")
BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class FlushCounts:
    """Counts since the engine started. Dry runs and refused parameters are not flushes.

    Every outcome is counted from 0 on: Prometheus does not see the increase to the first value of a series.
    """

    def __init__(self) -> None:
        outcomes: tuple[FlushOutcome, ...] = get_args(FlushOutcome)
        self._ended = Counter({(mode, outcome): 0 for mode in MODES for outcome in outcomes})
        self._blockers: Counter[str] = Counter()  # flushes that expired while this kept the engine busy
        self._waited = {mode: [0] * (len(BOUNDS_S) + 1) for mode in MODES}
        self._waited_s = dict.fromkeys(MODES, 0.0)

    def ended(self, mode: str, outcome: FlushOutcome, *, waited_s: float, blockers: dict[str, int]) -> None:
        """A flush is answered; `blockers` are those that its answer names."""
        self._ended[mode, outcome] += 1
        self._waited[mode][bisect_left(BOUNDS_S, waited_s)] += 1
        self._waited_s[mode] += waited_s
        if outcome in ("expired", "held"):
            self._blockers.update(blockers.keys())

    def by_outcome(self) -> dict[str, int]:
        """`{mode}:{outcome}` -> flushes."""
        return {f"{mode}:{outcome}": count for (mode, outcome), count in self._ended.items()}

    def blockers(self) -> dict[str, int]:
        """Blocker -> flushes whose deadline passed while it was there."""
        return dict(self._blockers)

    def distributions(self) -> list[Distribution]:
        """The seconds that flushes waited, by mode."""
        return [
            Distribution(
                name="flush_waited_seconds",
                labels={"mode": mode},
                bounds=BOUNDS_S,
                counts=tuple(counts),
                total=self._waited_s[mode],
            )
            for mode, counts in self._waited.items()
        ]
