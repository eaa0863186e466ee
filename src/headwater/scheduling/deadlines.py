"""Requests that have waited, or run, for too long."""

import math
from collections import OrderedDict

from headwater.clock import Clock
from headwater.messages.generation import Finish
from headwater.scheduling.answers import took_too_long, waited_too_long
from headwater.scheduling.counters import Counters
from headwater.scheduling.limits import SchedulerLimits
from headwater.scheduling.queue_gate import QueueGate
from headwater.scheduling.request import Request


class _OldestFirst:
    """Requests with the same timeout, in the order of arrival, so the first one is due first."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = math.inf if timeout_s is None else timeout_s
        self._requests: OrderedDict[Request, None] = OrderedDict()

    def add(self, request: Request) -> None:
        if self.timeout_s < math.inf:
            self._requests[request] = None

    def remove(self, request: Request) -> None:
        self._requests.pop(request, None)

    def due_in_s(self, now_s: float) -> float:
        """Seconds until the first one is due; infinite if there is none."""
        first = next(iter(self._requests), None)
        return math.inf if first is None else first.arrived_s + self.timeout_s - now_s

    def due(self, now_s: float) -> Request | None:
        return next(iter(self._requests)) if self.due_in_s(now_s) <= 0 else None


class Deadlines:
    """When a request has waited in the queue, or has taken in all, for as long as it may."""

    def __init__(self, *, limits: SchedulerLimits, gate: QueueGate, counters: Counters, clock: Clock) -> None:
        self._gate = gate
        self._counters = counters
        self._clock = clock
        self._not_started = _OldestFirst(limits.queue_timeout_s)
        self._not_ended = _OldestFirst(limits.request_timeout_s)

    def arrived(self, request: Request) -> None:
        self._not_started.add(request)
        self._not_ended.add(request)

    def started(self, request: Request) -> None:
        """The queue's timeout never ends a request that has started, also if it waits again."""
        self._not_started.remove(request)

    def ended(self, request: Request) -> None:
        self._not_started.remove(request)
        self._not_ended.remove(request)

    def overdue(self) -> tuple[Request, Finish] | None:
        """A request whose time is over, and its last word. The caller ends it before it asks for the next."""
        now_s = self._clock.now()
        if (request := self._not_started.due(now_s)) is not None:
            self._counters.limited_queue_timeout += 1
            return request, waited_too_long(self._not_started.timeout_s, retry_after_s=self._gate.whole_queue_s())
        if (request := self._not_ended.due(now_s)) is not None:
            self._counters.limited_request_timeout += 1
            return request, took_too_long(self._not_ended.timeout_s)
        return None

    def next_look_s(self) -> float:
        """Seconds until the next request is overdue; infinite if there is none."""
        now_s = self._clock.now()
        return max(0.0, min(self._not_started.due_in_s(now_s), self._not_ended.due_in_s(now_s)))
