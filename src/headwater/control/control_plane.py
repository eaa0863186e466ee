"""Deferred operations: started by a message, looked at every turn, answered exactly once."""

import itertools

from headwater.clock import Clock, Deadline
from headwater.control.flush import Flush
from headwater.control.operation import Caller, Operation, PendingOperation
from headwater.control.pause import Pause
from headwater.control.ports import BlockersPort, CachePort, FlushScope, RequestsPort, StepPort
from headwater.messages import (
    CancelOperation,
    ContinueGeneration,
    Done,
    Failed,
    FlushCache,
    OperationInfo,
    PauseGeneration,
    ToClient,
    unpack_ids,
)

_STEP_TIMEOUT_S = 600.0  # a pause answers when the step in flight is done; no step takes this long


class ControlPlane:
    """All pending operations, and who keeps admission closed.

    Any number may be pending; each has its own deadline, counted from its arrival. One idle moment answers
    all that wait for it.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        cache: CachePort,
        requests: RequestsPort,
        step: StepPort,
        blockers: BlockersPort,
        max_timeout_s: float,
    ) -> None:
        self._clock = clock
        self._cache = cache
        self._requests = requests
        self._step = step
        self._blockers = blockers
        self._max_timeout_s = max_timeout_s
        self._pending: list[PendingOperation] = []
        self._answers: list[tuple[bytes, ToClient]] = []
        self._ids = itertools.count(1)
        self.is_paused = False

    # --- messages -----------------------------------------------------------------------------------

    def flush(self, message: FlushCache, client: bytes) -> None:
        failure = self._flush_refusal(message)
        if failure is not None:
            self._answers.append((client, failure))
            return
        scope = FlushScope(
            tiers=message.tiers or self._cache.tiers,
            cache_salt=message.cache_salt,
            extra_key=message.extra_key,
            prefix=None if message.prefix_ids is None else unpack_ids(message.prefix_ids),
        )
        self._start(Flush(message, scope, self._cache), Caller(client, message.call_id), message.timeout_s)

    def pause(self, message: PauseGeneration, client: bytes) -> None:
        self.is_paused = True
        pause = Pause(message, self._requests, self._step)
        self._start(pause, Caller(client, message.call_id), _STEP_TIMEOUT_S)

    def resume(self, message: ContinueGeneration, client: bytes) -> None:
        self.is_paused = False
        self._answers.append((client, Done(call_id=message.call_id)))

    def cancel(self, message: CancelOperation, client: bytes) -> None:
        """Cancel by operation id, or (when its caller went away) by the call that started it."""
        for pending in self._pending:
            is_named = message.operation_id and pending.operation_id == message.operation_id
            started = Caller(client, message.started_by_call)
            if is_named or pending.caller == started:
                self._pending.remove(pending)
                moment = pending.moment(self._clock, self._blockers())
                self._answers.append((pending.caller.client, pending.operation.cancelled(moment)))
                self._answers.append((client, Done(call_id=message.call_id)))
                return
        text = f"no operation {message.operation_id or message.started_by_call!r} is pending"
        self._answers.append((client, Failed(call_id=message.call_id, status=404, message=text)))

    # --- every turn ---------------------------------------------------------------------------------

    def advance(self) -> None:
        """Look at every pending operation, in order of arrival. Costs nothing when none is pending."""
        if not self._pending:
            return
        still_pending = []
        for pending in self._pending:
            moment = pending.moment(self._clock, self._blockers())
            answer = pending.operation.look(moment)
            if answer is None:
                still_pending.append(pending)
            else:
                self._answers.append((pending.caller.client, answer))
        self._pending = still_pending

    def take_answers(self) -> list[tuple[bytes, ToClient]]:
        answers, self._answers = self._answers, []
        return answers

    @property
    def holds_starts(self) -> bool:
        """Whether an operation keeps requests that have never started queued."""
        return any(p.operation.holds_starts for p in self._pending)

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def next_deadline_s(self) -> float | None:
        """Seconds until the earliest deadline; None if nothing is pending."""
        return min((p.deadline.remaining_s(self._clock) for p in self._pending), default=None)

    def operations(self) -> tuple[OperationInfo, ...]:
        blockers = self._blockers() if self._pending else {}
        return tuple(
            OperationInfo(
                operation_id=p.operation_id,
                kind=p.operation.kind,
                phase=p.operation.phase,
                waited_s=self._clock.now() - p.arrived_s,
                remaining_s=p.deadline.remaining_s(self._clock),
                blockers=blockers,
            )
            for p in self._pending
        )

    # ------------------------------------------------------------------------------------------------

    def _start(self, operation: Operation, caller: Caller, timeout_s: float) -> None:
        self._pending.append(
            PendingOperation(
                operation_id=f"op-{next(self._ids)}",
                operation=operation,
                caller=caller,
                arrived_s=self._clock.now(),
                deadline=Deadline.after(self._clock, timeout_s),
            )
        )

    def _flush_refusal(self, message: FlushCache) -> Failed | None:
        param, text = None, ""
        if not 0 <= message.timeout_s <= self._max_timeout_s:  # also false for NaN
            param, text = "timeout", f"timeout must be between 0 and {self._max_timeout_s:g} seconds"
        unknown = [tier for tier in message.tiers if tier not in self._cache.tiers]
        if unknown:
            enabled = ", ".join(self._cache.tiers)
            param, text = "tiers", f"tier {unknown[0]!r} is not enabled; enabled: {enabled}"
        if message.prefix_ids is not None and not message.prefix_ids:
            param, text = "prefix_ids", "prefix_ids must hold at least one token"
        if message.prefix_ids is not None and "storage" in message.tiers:
            param, text = "prefix_ids", "storage cannot be flushed by prefix: its keys are hashes"
        if param is None:
            return None
        return Failed(call_id=message.call_id, status=400, message=text, param=param)
