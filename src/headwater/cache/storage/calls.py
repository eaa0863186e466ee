"""Calls of a store: off the loop, with a deadline, behind a circuit breaker. Their outcome is handled on the loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headwater.cache.jobs import Job, JobRunner
from headwater.cache.storage.health import CallKind, StoreHealth
from headwater.clock import Clock, Deadline
from headwater.storage.errors import StorageError
from headwater.storage.guard import CallPermit, CircuitBreaker


@dataclass(slots=True, eq=False)
class _Call:
    job: Job
    kind: CallKind
    permit: CallPermit | None
    deadline: Deadline
    finish: Callable[[Any], None]
    fail: Callable[[str], None]


class StorageCalls:
    """All calls of one store. For each call either `finish` or `fail` runs, exactly once, on the loop."""

    def __init__(self, jobs: JobRunner, *, clock: Clock, timeout_s: float) -> None:
        self.breaker = CircuitBreaker(clock, slow_call_s=timeout_s)
        self.health = StoreHealth(clock, self.breaker)
        self._jobs = jobs
        self._clock = clock
        self._timeout_s = timeout_s
        self._calls: list[_Call] = []

    def begin(
        self,
        work: Callable[[Job], Any],
        *,
        kind: CallKind,
        finish: Callable[[Any], None],
        fail: Callable[[str], None],
        is_guarded: bool = True,
    ) -> None:
        """Run `work` in a job, then `finish` with its result or `fail` with a cause. `fail` may run immediately.

        A guarded call is refused while the breaker is open, and the breaker counts its outcome.
        """
        permit = self.breaker.try_enter() if is_guarded else None
        if is_guarded and permit is None:
            fail("breaker_open")
            return
        job = self._jobs.submit(work)
        if job is None:
            self._failed(kind, permit, cause="busy")
            fail("busy")
            return
        deadline = Deadline.after(self._clock, self._timeout_s)
        self._calls.append(_Call(job, kind, permit, deadline, finish, fail))

    def advance(self) -> bool:
        """Handle calls that have ended, and give up those past their deadline; returns whether there were any."""
        ended = False
        for call in self._calls.copy():
            if call.job.is_done():
                self._calls.remove(call)
                self._settle(call)
                ended = True
            elif call.deadline.has_passed(self._clock):
                self._give_up(call, "deadline")
                ended = True
        return ended

    def give_up_all(self, cause: str) -> None:
        for call in self._calls.copy():
            self._give_up(call, cause)

    @property
    def has_any(self) -> bool:
        return bool(self._calls)

    def _give_up(self, call: _Call, cause: str) -> None:
        call.job.abandon()  # from here on it touches no page
        self._calls.remove(call)
        self._failed(call.kind, call.permit, cause=cause)
        call.fail(cause)

    def _settle(self, call: _Call) -> None:
        error = call.job.error
        if error is None:
            self._succeeded(call)
            call.finish(call.job.result)
            return
        cause = error.cause if isinstance(error, StorageError) else "error"
        self._failed(call.kind, call.permit, cause=cause, details=str(error))
        call.fail(cause)

    def _succeeded(self, call: _Call) -> None:
        if call.permit is not None and not self.breaker.succeeded(call.permit):
            self.health.failed(call.kind, cause="slow")
        else:
            self.health.succeeded(call.kind, is_probe=call.permit is not None and call.permit.is_probe)

    def _failed(self, kind: CallKind, permit: CallPermit | None, *, cause: str, details: str = "") -> None:
        if permit is not None:
            self.breaker.failed(permit, cause=cause, details=details)
        self.health.failed(kind, cause=cause, details=details)
