"""The promises of timeouts: none passes unnoticed, and none ends a request that it does not cover."""

import math
from collections.abc import Callable

from headwater.scheduling.limits import SchedulerLimits
from headwater.simulation.checks.oracle import Oracle
from headwater.simulation.checks.request_model import RequestModel
from headwater.simulation.checks.violation import Violation

_TOLERANCE_S = 1e-6  # of sums of times


class TimeoutPromises:
    """Compares the requests of one engine with its timeouts."""

    def __init__(self, oracle: Oracle, *, limits: SchedulerLimits, now_s: Callable[[], float]) -> None:
        self._oracle = oracle
        self._queue_timeout_s = math.inf if limits.queue_timeout_s is None else limits.queue_timeout_s
        self._request_timeout_s = math.inf if limits.request_timeout_s is None else limits.request_timeout_s
        self._now_s = now_s

    @property
    def are_set(self) -> bool:
        return min(self._queue_timeout_s, self._request_timeout_s) < math.inf

    def note_due(self, *, slept_s: float) -> None:
        """The engine reads its messages, after it has slept: which requests its timeouts may end in this turn."""
        if not self.are_set:
            return
        for model in self._oracle.active.values():
            model.timeouts_due = self._due(model, at_s=self._now_s() + slept_s)

    def check_sleep(self, wait_s: float) -> None:
        """The loop is about to sleep, and must wake for the next timeout."""
        if not self.are_set or wait_s <= _TOLERANCE_S:
            return
        for model in self._oracle.active.values():
            if self._due(model, at_s=self._now_s() + wait_s - _TOLERANCE_S):
                raise Violation("timeouts_are_kept", f"the loop sleeps {wait_s} s past that of {model.rid}")

    def check(self) -> None:
        """At the end of a turn, no request is there that a timeout should have ended."""
        if not self.are_set:
            return
        for model in self._oracle.active.values():
            if (due := self._due(model, at_s=self._now_s())):
                raise Violation("timeouts_are_kept", f"{model.rid} is there at {self._now_s():.3f} s, due was {due}")

    def _due(self, model: RequestModel, *, at_s: float) -> set[int]:
        """The statuses with which timeouts end `model` if it is there at `at_s`."""
        if not model.is_delivered:
            return set()
        due: set[int] = set()
        if not model.has_started and at_s >= model.arrived_s + self._queue_timeout_s:
            due.add(503)
        if at_s >= model.arrived_s + self._request_timeout_s:
            due.add(504)
        return due
