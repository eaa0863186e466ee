"""Control calls without an answer: their callers, their arrival and their deadlines."""

from dataclasses import dataclass

from headwater.clock import ManualClock
from headwater.messages.base import Answer, TimedCall
from headwater.messages.control import CancelOperation, FlushCache, PauseGeneration
from headwater.messages.generation import Generate, GenerateBatch
from headwater.messages.weights import ReleaseMemory, UpdateWeights
from headwater.messages.wire import ToEngine
from headwater.simulation.checks.violation import Violation

CallKey = tuple[bytes, str]  # client and call id
_SLEEP_TOLERANCE_S = 0.005
STORE_GRACE_S = 1.0  # least time for a store to acknowledge a flush, with any timeout
_POLL_S = 0.02  # interval at which the loop polls the store after the timeout


@dataclass(slots=True, eq=False)
class PendingCall:
    """A call that the engine has read, in `turn`."""

    client: bytes
    message: ToEngine
    turn: int
    number: int  # in the order of arrival
    arrived_s: float
    deadline_s: float | None  # None: due in the same turn, or at the end of the step in flight
    num_late_turns: int = 0
    is_cancelled: bool = False
    was_refused: bool = False

    @property
    def num_late_turns_allowed(self) -> int:
        if isinstance(self.message, PauseGeneration | UpdateWeights | ReleaseMemory):
            return 2  # it may wait for the step in flight
        return 0


class PendingCalls:
    """Checks that every call is answered exactly once and in time."""

    def __init__(self, clock: ManualClock, *, max_timeout_s: float) -> None:
        self.pending: dict[CallKey, PendingCall] = {}
        self._clock = clock
        self._max_timeout_s = max_timeout_s
        self._num_delivered = 0

    def delivered(self, client: bytes, message: ToEngine, *, turn: int) -> None:
        """The engine reads `message` in this turn."""
        if isinstance(message, Generate | GenerateBatch):
            return
        deadline_s = None
        if isinstance(message, TimedCall):
            is_valid = 0 <= message.timeout_s <= self._max_timeout_s
            deadline_s = self._clock.now() + message.timeout_s if is_valid else None
            if deadline_s is not None and _asks_store(message):
                deadline_s = max(deadline_s, self._clock.now() + STORE_GRACE_S) + _POLL_S
        key = (client, message.call_id)
        assert key not in self.pending, f"call id {message.call_id} is used twice at the same time"
        self.pending[key] = PendingCall(client, message, turn, self._num_delivered, self._clock.now(), deadline_s)
        self._num_delivered += 1
        if isinstance(message, CancelOperation):
            target = self.pending.get((client, message.started_by_call))
            if target is not None and target.deadline_s is not None:
                target.is_cancelled = True

    def answered(self, client: bytes, answer: Answer) -> PendingCall:
        """A client has received `answer`; return its call, which is no longer pending."""
        key = (client, answer.call_id)
        call = self.pending.pop(key, None)
        if call is None:
            raise Violation("answered_once", f"call {key[1]} was answered, though it is not pending")
        return call

    def now_s(self) -> float:
        return self._clock.now()

    def check_deadlines(self) -> None:
        """At the end of a turn, no call is pending that was due in it."""
        if not self.pending:
            return
        now_s = self._clock.now()
        for call in self.pending.values():
            if call.deadline_s is None or now_s >= call.deadline_s or call.is_cancelled:
                call.num_late_turns += 1
                if call.num_late_turns > call.num_late_turns_allowed:
                    raise Violation("deadline_kept", f"{call.message} of turn {call.turn} at {now_s:.3f} s")

    def check_sleep(self, wait_s: float) -> None:
        """The loop is about to sleep, and must wake for the next deadline."""
        if not self.pending:
            return
        until_s = self._clock.now() + wait_s
        for call in self.pending.values():
            if call.deadline_s is None or _asks_store(call.message):
                continue
            if until_s > max(call.deadline_s, self._clock.now()) + _SLEEP_TOLERANCE_S:
                raise Violation("deadline_wakes", f"the loop sleeps {wait_s} s past the deadline of {call.message}")


def _asks_store(message: ToEngine) -> bool:
    return isinstance(message, FlushCache) and "storage" in message.tiers
