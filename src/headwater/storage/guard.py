"""A circuit breaker: a failing or slow store gets no calls, except a probe from time to time.

After M. Nygard, "Release It!" (2007). The caller of a backend owns the breaker, so that it covers every kind of
failure: errors, missed deadlines, calls that succeeded too late.
"""

import logging
import threading
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from headwater.clock import Clock

_log = logging.getLogger(__name__)


class BreakerState(StrEnum):
    CLOSED = "closed"  # calls pass
    OPEN = "open"  # calls are refused until the pause ends
    HALF_OPEN = "half_open"  # the next call is the probe; other calls are refused until it ends


@dataclass(frozen=True, slots=True)
class CallPermit:
    """Permission for one call. Return it exactly once, to `succeeded` or to `failed`."""

    term: int  # counts changes of state; results of calls from an earlier state are ignored
    is_probe: bool
    entered_s: float


class CircuitBreaker:
    """Refuses calls to a store after consecutive failures. Thread-safe.

    `failure_threshold` consecutive failures open the breaker for `open_s` seconds; then one probe may pass. If the
    probe fails, the pause doubles, up to `max_open_s`. A call that took longer than `slow_call_s` counts as a failure
    with the cause `slow`.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        failure_threshold: int = 5,
        slow_call_s: float | None = None,
        open_s: float = 1.0,
        max_open_s: float = 30.0,
    ) -> None:
        if failure_threshold < 1:
            raise ValueError(f"failure_threshold must be at least 1, found {failure_threshold}")
        if slow_call_s is not None and not slow_call_s > 0:
            raise ValueError(f"slow_call_s must be positive, found {slow_call_s}")
        if not 0 < open_s <= max_open_s:
            raise ValueError(f"open_s must be positive and at most max_open_s={max_open_s}, found {open_s}")
        self._clock = clock
        self._failure_threshold = failure_threshold
        self._slow_call_s = slow_call_s
        self._first_pause_s = open_s
        self._max_pause_s = max_open_s
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._term = 0
        self._num_failures = 0  # consecutive
        self._pause_s = open_s
        self._probe_at_s: float | None = None  # when a probe may pass; None: closed
        self._has_probe = False

    @property
    def state(self) -> BreakerState:
        with self._lock:
            return self._state()

    @property
    def retry_in_s(self) -> float:
        """Seconds until a probe may pass; 0 if one may pass now, or all calls may."""
        with self._lock:
            return 0.0 if self._probe_at_s is None else max(0.0, self._probe_at_s - self._clock.now())

    def try_enter(self) -> CallPermit | None:
        """Permission to call the store now, or None if the caller must do without the store."""
        with self._lock:
            state = self._state()
            if state is BreakerState.OPEN or (state is BreakerState.HALF_OPEN and self._has_probe):
                self._counts["refused"] += 1
                return None
            is_probe = state is BreakerState.HALF_OPEN
            self._has_probe = is_probe
            self._counts["probes"] += is_probe
            return CallPermit(self._term, is_probe, self._clock.now())

    def succeeded(self, permit: CallPermit) -> bool:
        """The call succeeded. Returns False if it was slow, which counts as a failure."""
        took_s = self._clock.now() - permit.entered_s
        if self._slow_call_s is not None and took_s > self._slow_call_s:
            self.failed(permit, cause="slow")
            return False
        with self._lock:
            self._counts["succeeded"] += 1
            if permit.term != self._term:
                return True
            self._num_failures = 0
            if permit.is_probe:
                self._probe_at_s = None
                self._pause_s = self._first_pause_s
                self._begin_term("closed")
                _log.warning("the store answers again: its pages are read and written")
        return True

    def failed(self, permit: CallPermit, *, cause: str, details: str = "") -> None:
        """The call failed, missed its deadline or was abandoned; `cause` is its name in the counters.

        The log gets a line with `details` when the store is left alone, and none for the probes after that.
        """
        with self._lock:
            self._counts["failed"] += 1
            self._counts[f"failed_{cause}"] += 1
            if permit.term != self._term:
                return
            self._num_failures += 1
            if permit.is_probe:
                self._pause_s = min(2 * self._pause_s, self._max_pause_s)
            if permit.is_probe or self._num_failures >= self._failure_threshold:
                self._probe_at_s = self._clock.now() + self._pause_s
                self._begin_term("opened")
                if not permit.is_probe:
                    why = f"{cause}: {details}" if details else cause
                    _log.warning("the store fails (%s): requests are served without it until a probe succeeds", why)

    def counters(self) -> dict[str, int]:
        """Monotonic counts: succeeded, failed, failed_<cause>, refused, probes, opened, closed."""
        with self._lock:
            return dict(self._counts)

    def _state(self) -> BreakerState:
        if self._probe_at_s is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock.now() < self._probe_at_s else BreakerState.HALF_OPEN

    def _begin_term(self, event: str) -> None:
        self._term += 1
        self._num_failures = 0
        self._has_probe = False
        self._counts[event] += 1
