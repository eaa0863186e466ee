"""Control messages: each is answered at once or starts an operation, and is answered exactly once."""

from headwater.clock import Clock
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.operation import Caller, Hold, Moment, Permit
from headwater.control.operations import OPERATIONS
from headwater.control.pending_operations import PendingOperations
from headwater.control.reports.operation_log import log_operation
from headwater.messages.base import Answer, Call, TimedCall, is_timeout
from headwater.messages.control import CancelOperation, Done, Failed, GetOperations, OperationList
from headwater.messages.two_phase import Commit, InStep, Prepare

BEHIND = "behind"  # why new requests are refused


class ControlPlane:
    """Takes control messages, and says what they keep from running."""

    def __init__(self, engine: ControlledEngine, *, clock: Clock, max_timeout_s: float) -> None:
        self.pending = PendingOperations(clock=clock, blockers=engine.blockers, reply=self._reply)
        self.is_behind = False  # the other engines have made a change that came too late here
        self._engine = engine
        self._max_timeout_s = max_timeout_s
        self._answers: list[tuple[bytes, Answer]] = []

    def handle(self, message: Call, client: bytes) -> None:
        """Answer `message`, or start the operation that will."""
        match message:
            case Prepare():  # the change is carried out when `Commit` comes
                self._start(message.change, client, permit=Permit(is_given=False))
            case Commit():
                self._commit(message, client)
            case InStep():
                self.is_behind = False
                self._engine.scheduler.why_refusing.pop(BEHIND, None)
                self._reply(client, Done(call_id=message.call_id))
            case CancelOperation():
                self._reply(client, self.pending.cancel(message, client))
            case GetOperations():
                self._reply(client, OperationList(call_id=message.call_id, items=self.pending.infos()))
            case _:
                self._start(message, client, permit=Permit())

    def advance(self) -> None:
        """Look at every pending operation, in order of arrival."""
        self.pending.advance()

    def take_answers(self) -> list[tuple[bytes, Answer]]:
        answers, self._answers = self._answers, []
        return answers

    @property
    def has_answers(self) -> bool:
        return bool(self._answers)

    @property
    def hold(self) -> Hold:
        """What may not run now, because of an order or of a pending operation."""
        orders = self._engine.orders
        return Hold.ALL if orders.is_paused or orders.released else self.pending.hold

    @property
    def held_by(self) -> tuple[str, ...]:
        """Orders by which requests wait now, by name; empty when requests that arrive may run."""
        names = ["pause"] if self.is_paused else []
        names += [f"released_{tag}" for tag in self.released_memory]
        return tuple(dict.fromkeys(names + self.pending.kinds_that_hold))

    def in_flight(self) -> dict[str, int]:
        return self.pending.in_flight()

    @property
    def num_pending(self) -> int:
        return len(self.pending)

    @property
    def is_paused(self) -> bool:
        return self._engine.orders.is_paused

    @property
    def released_memory(self) -> tuple[str, ...]:
        return self._engine.orders.released_tags()

    def _start(self, message: Call, client: bytes, *, permit: Permit) -> None:
        if isinstance(message, TimedCall) and not is_timeout(message.timeout_s, max_s=self._max_timeout_s):
            text = f"timeout must be between 0 and {self._max_timeout_s:g} seconds"
            self._reply(client, Failed(call_id=message.call_id, status=400, message=text, param="timeout"))
            return
        operation = OPERATIONS[type(message)](message, self._engine, permit)
        answer: Answer | None = operation.arrive()
        if answer is None and operation.is_immediate and permit.is_given:
            answer = self.pending.look(operation, Moment(count_blockers=dict, waited_s=0.0, has_expired=False))
        if answer is not None:
            log_operation(operation.kind, answer, waited_s=0.0)
            self._reply(client, answer)
        else:
            self.pending.add(operation, message, client, permit=permit)

    def _commit(self, message: Commit, client: bytes) -> None:
        """All engines have prepared: carry out what was prepared, unless it has been given up meanwhile."""
        if self.pending.commit(Caller(client, message.prepared)):
            return
        self.is_behind = True
        why = "the engine has missed a change that is in force on the server, and is catching up"
        self._engine.scheduler.why_refusing[BEHIND] = why
        text = "the prepared change has been given up: no commit came in time"
        self._reply(client, Failed(call_id=message.prepared, status=410, message=text))

    def _reply(self, client: bytes, answer: Answer) -> None:
        self._answers.append((client, answer))
