"""The engine's clock, which tests and the simulation replace, and deadlines on it."""

import math
import time
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock, in seconds. Only differences between its values have a meaning."""

    def now(self) -> float: ...


class MonotonicClock:
    """The machine's monotonic clock: changes of the date do not move it, and it runs while the process sleeps."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that only `advance` moves; for tests and the simulation."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        if not seconds >= 0:
            raise ValueError(f"a monotonic clock cannot go back: advance({seconds!r})")
        self._now_s += seconds


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on a clock. It is computed when a request arrives, so that time in queues counts."""

    at_s: float

    @classmethod
    def after(cls, clock: Clock, seconds: float) -> "Deadline":
        if math.isnan(seconds):
            raise ValueError("a deadline cannot be NaN seconds away")
        return cls(clock.now() + seconds)

    def remaining_s(self, clock: Clock) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - clock.now())

    def has_passed(self, clock: Clock) -> bool:
        return clock.now() >= self.at_s
