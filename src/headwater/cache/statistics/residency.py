"""How long pages stay on a tier, and how often they are used again: a sample, for the metrics.

The sample is drawn by runs and counted by pages: every run of pages has the same chance, whatever its length, and a run
that is split stays in the sample with both halves. So a mean over the sample estimates the mean over all pages.
"""

from bisect import bisect_left

from headwater.clock import Clock
from headwater.messages.state import Distribution

SAMPLED_ONE_IN = 8
# From a burst of chats to a page that was last used yesterday: the sizes that decide on a larger tier.
BOUNDS_S = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0, 86400.0)
_STRIDE = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: its multiples fall evenly and in no order
_WRAP = (1 << 64) - 1


class DurationCounts:
    """A histogram of durations in seconds. Not thread-safe."""

    __slots__ = ("_counts", "_sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def add(self, duration_s: float, count: int) -> None:
        """`count` observations of the same duration."""
        self._counts[bisect_left(BOUNDS_S, duration_s)] += count
        self._sum_s += duration_s * count

    def distribution(self, name: str, **labels: str) -> Distribution:
        """As the engine's state reports it."""
        return Distribution(name=name, labels=labels, bounds=BOUNDS_S, counts=tuple(self._counts), total=self._sum_s)


class Stay:
    """One run of the sample, from its arrival on a tier until it leaves it."""

    __slots__ = ("_residency", "_since_s", "_used_s")

    def __init__(self, residency: "Residency", *, since_s: float, used_s: float) -> None:
        self._residency = residency
        self._since_s = since_s
        self._used_s = used_s

    def copy(self) -> "Stay":
        """For the other half of a run that is split."""
        return Stay(self._residency, since_s=self._since_s, used_s=self._used_s)

    def used(self, num_pages: int) -> None:
        """A request begins with these pages."""
        now_s = self._residency.clock.now()
        self._residency.reuse_gap.add(now_s - self._used_s, num_pages)
        self._used_s = now_s

    def released(self) -> None:
        """Nothing uses the pages any more."""
        self._used_s = self._residency.clock.now()

    def evicted(self, num_pages: int) -> None:
        now_s = self._residency.clock.now()
        self._residency.lifetime.add(now_s - self._since_s, num_pages)
        self._residency.idle.add(now_s - self._used_s, num_pages)


class Residency:
    """The sample of one tier. Retired runs leave it uncounted: a flush says nothing about the tier's size."""

    def __init__(self, clock: Clock, *, one_in: int = SAMPLED_ONE_IN) -> None:
        self.clock = clock
        self.lifetime = DurationCounts()  # from the arrival to the eviction
        self.idle = DurationCounts()  # from the last use to the eviction
        self.reuse_gap = DurationCounts()  # from one use to the next
        self._limit = _WRAP // one_in
        self._number = 0

    def begin(self) -> Stay | None:
        """For a run that arrives on the tier: its stay, if it belongs to the sample."""
        self._number = (self._number + _STRIDE) & _WRAP
        if self._number > self._limit:
            return None
        now_s = self.clock.now()
        return Stay(self, since_s=now_s, used_s=now_s)

    def distributions(self, tier: str) -> list[Distribution]:
        """For the metrics."""
        return [
            self.lifetime.distribution("page_lifetime_seconds", tier=tier),
            self.idle.distribution("page_idle_before_eviction_seconds", tier=tier),
            self.reuse_gap.distribution("page_reuse_gap_seconds", tier=tier),
        ]
