"""Which calls of a store fail, since when and why: what an operator is shown of a store in trouble."""

from dataclasses import dataclass
from enum import StrEnum

from headwater.clock import Clock
from headwater.messages.cache import StoreTrouble
from headwater.storage.guard import BreakerState, CircuitBreaker

FAILURES_THAT_COUNT = 3  # in a row, of one kind of call


class CallKind(StrEnum):
    """What a call does. A store may fail in one kind alone: a full disk is still read."""

    LOOK_UP = "look_up"
    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    UPKEEP = "upkeep"


@dataclass(slots=True)
class _Failures:
    """Consecutive failures of one kind of call."""

    since_s: float
    count: int = 0


class StoreHealth:
    """Counts consecutive failures by kind of call.

    The circuit breaker counts all calls together, so it stays closed as long as any kind succeeds: a Redis server that
    rejects writes would look healthy.
    """

    def __init__(self, clock: Clock, breaker: CircuitBreaker) -> None:
        self._clock = clock
        self._breaker = breaker
        self._failures: dict[CallKind, _Failures] = {}
        self._last = ("", "")  # cause and details of the newest failure

    def succeeded(self, kind: CallKind, *, is_probe: bool) -> None:
        """A probe that succeeds ends all trouble; what still fails is counted anew."""
        if is_probe:
            self._failures.clear()
        else:
            self._failures.pop(kind, None)

    def failed(self, kind: CallKind, *, cause: str, details: str = "") -> None:
        self._failures.setdefault(kind, _Failures(self._clock.now())).count += 1
        self._last = (cause, details)

    def trouble(self) -> StoreTrouble | None:
        """None if calls are made and no kind of call fails again and again."""
        is_left_alone = self._breaker.state is not BreakerState.CLOSED
        failing = [kind for kind, found in self._failures.items() if found.count >= FAILURES_THAT_COUNT]
        if not failing and not is_left_alone:
            return None
        began_s = [found.since_s for found in self._failures.values()]
        cause, details = self._last
        return StoreTrouble(
            is_left_alone=is_left_alone,
            failing=tuple(sorted(failing)),
            cause=cause,
            details=details,
            failing_s=self._clock.now() - min(began_s, default=self._clock.now()),
            retry_in_s=self._breaker.retry_in_s,
        )
