"""The operations that have not been answered: looked at every turn, in order of arrival."""

import itertools
from collections.abc import Callable

from headwater.clock import Clock, Deadline
from headwater.control.operation import Caller, Hold, Moment, Operation, PendingOperation, Permit
from headwater.control.reports.operation_log import log_operation
from headwater.messages.base import Answer, Call, TimedCall
from headwater.messages.control import CancelOperation, Done, Failed, OperationInfo
from headwater.messages.two_phase import Prepared

_STEP_TIMEOUT_S = 600.0  # for a call without a timeout: a pause waits for the step in flight, and no step takes as long
_POLL_S = 0.02


class PendingOperations:
    """Any number may be pending; each has its own deadline, counted from its arrival.

    One idle moment answers all that wait for it. `reply` takes each answer and the client that it goes to.
    """

    def __init__(
        self, *, clock: Clock, blockers: Callable[[], dict[str, int]], reply: Callable[[bytes, Answer], None]
    ) -> None:
        self._clock = clock
        self._blockers = blockers
        self._reply = reply
        self._pending: list[PendingOperation] = []
        self._ids = itertools.count(1)
        self._has_answered = False  # in the last turn: what others wait for may have happened

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, operation: Operation, message: Call, client: bytes, *, permit: Permit) -> None:
        """From now on `operation` is looked at every turn. `message` came from `client` in this turn."""
        timeout_s = message.timeout_s if isinstance(message, TimedCall) else _STEP_TIMEOUT_S
        self._pending.append(
            PendingOperation(
                operation_id=f"op-{next(self._ids)}",
                operation=operation,
                caller=Caller(client, message.call_id),
                arrived_s=self._clock.now(),
                deadline=Deadline.after(self._clock, timeout_s),
                expires_at_s=message.expires_at_s,
                permit=permit,
            )
        )

    def commit(self, caller: Caller) -> bool:
        """Permit what `caller` has prepared. False: it has been given up."""
        for pending in self._pending:
            if pending.caller == caller and pending.permit.is_awaited and not pending.has_expired(self._clock):
                pending.commit()
                return True
        return False

    def look(self, operation: Operation, moment: Moment) -> Answer | None:
        """The answer of `operation`, after those of the operations that it ends: callers rely on this order."""
        answer = operation.look(moment)
        if answer is not None and operation.ends is not None:
            for pending in [p for p in self._pending if p.operation.kind == operation.ends and p.permit.is_given]:
                self._pending.remove(pending)
                moment_of = pending.moment(self._clock, self._blockers)
                self._end(pending, pending.operation.cancelled(moment_of, "ended by another"))
        return answer

    def cancel(self, message: CancelOperation, client: bytes) -> Answer:
        """Cancel by operation id, or by the call that started it (its caller left). The answer for `client`."""
        started = Caller(client, message.started_by_call)
        for pending in self._pending:
            is_named = message.operation_id != "" and pending.operation_id == message.operation_id
            if is_named or pending.caller == started:
                if pending.is_decided:
                    text = "it is being carried out: every engine of the server could, and does"
                    return Failed(call_id=message.call_id, status=409, message=text)
                self._pending.remove(pending)
                moment = pending.moment(self._clock, self._blockers)
                self._end(pending, pending.operation.cancelled(moment, "cancelled"))
                return Done(call_id=message.call_id)
        text = f"no operation {message.operation_id or message.started_by_call!r} is pending"
        return Failed(call_id=message.call_id, status=404, message=text)

    def advance(self) -> None:
        """Look at every pending operation, in order of arrival. Costs nothing when none is pending."""
        self._has_answered = False
        if not self._pending:
            return
        has_exclusive = False
        for pending in self._pending.copy():
            if pending not in self._pending:
                continue  # ended by an operation before it
            moment = pending.moment(self._clock, self._blockers)
            pending.has_seen_deadline = moment.has_expired
            if pending.has_expired(self._clock):
                answer = pending.operation.cancelled(moment, "its caller no longer waits")
            elif has_exclusive and pending.operation.is_exclusive:
                reason = "the deadline passed while another operation was carried out"
                answer = pending.operation.cancelled(moment, reason) if moment.has_expired else None
            else:
                answer = self.look(pending.operation, moment)
                self._report_prepared(pending)
            if answer is not None:
                self._pending.remove(pending)
                self._end(pending, answer)
                self._has_answered = True
            has_exclusive |= answer is None and pending.operation.is_exclusive

    @property
    def hold(self) -> Hold:
        """The widest hold of all."""
        if not self._pending:  # as mostly, and asked for every turn
            return Hold.NOTHING
        return max([pending.operation.hold for pending in self._pending])

    @property
    def kinds_that_hold(self) -> list[str]:
        return [pending.operation.kind for pending in self._pending if pending.operation.hold > Hold.NOTHING]

    @property
    def num_decided(self) -> int:
        return sum(pending.is_decided for pending in self._pending)

    def next_look_s(self) -> float | None:
        """Seconds until an operation must be looked at again though nothing else happens; None if never."""
        if not self._pending:
            return None
        if self._has_answered:
            return 0.0  # a pause, for example, has just made the engine idle
        return min([self._wait_s(pending) for pending in self._pending])

    def in_flight(self) -> dict[str, int]:
        """Operations being carried out; one that waits is no blocker."""
        found: dict[str, int] = {}
        if not self._pending:
            return found
        for pending in self._pending:
            for name, count in pending.operation.in_flight().items():
                found[name] = found.get(name, 0) + count
        return found

    def infos(self) -> tuple[OperationInfo, ...]:
        blockers = self._blockers() if self._pending else {}
        return tuple(
            OperationInfo(
                operation_id=p.operation_id,
                kind=p.operation.kind,
                phase=p.phase,
                waited_s=self._clock.now() - p.arrived_s,
                remaining_s=p.deadline.remaining_s(self._clock),
                blockers=blockers,
                call_id=p.caller.call_id,
            )
            for p in self._pending
        )

    def _wait_s(self, pending: PendingOperation) -> float:
        remaining_s = pending.deadline.remaining_s(self._clock)
        if pending.expires_at_s is not None and (pending.permit.is_awaited or pending.has_seen_deadline):
            return max(0.0, pending.expires_at_s - self._clock.now())
        if not pending.operation.is_polling:
            return remaining_s
        return _POLL_S if pending.has_seen_deadline else min(remaining_s, _POLL_S)

    def _end(self, pending: PendingOperation, answer: Answer) -> None:
        waited_s = self._clock.now() - pending.arrived_s
        log_operation(pending.operation.kind, answer, waited_s=waited_s, operation_id=pending.operation_id)
        self._reply(pending.caller.client, answer)

    def _report_prepared(self, pending: PendingOperation) -> None:
        permit = pending.permit
        if permit.is_awaited and not permit.is_reported:
            permit.is_reported = True
            prepared = Prepared(call_id=pending.caller.call_id, weights_id=permit.weights_id, is_whole=permit.is_whole)
            self._reply(pending.caller.client, prepared)
