"""A control request that runs when its condition holds, or fails at its deadline."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from headwater.clock import Clock, Deadline
from headwater.messages.wire import ToClient

COMMITTED_S = 3600.0  # a decided operation ends by itself; its deadline is no reason any more to give it up


class Hold(IntEnum):
    """What an operation keeps from running while it is pending."""

    NOTHING = 0
    STARTS = 1  # requests that have never started stay queued
    ALL = 2  # no step is launched


@dataclass(slots=True)
class Permit:
    """Whether an operation may carry out what it has checked. With several engines it waits for word that all could."""

    is_given: bool = True
    is_awaited: bool = False  # all that can fail has been done
    is_reported: bool = False  # and its caller knows
    weights_id: str = ""  # that it would put in place
    is_whole: bool = True  # and nothing is left of those before

    def ask(self, *, weights_id: str = "", is_whole: bool = True) -> bool:
        """To be asked at the point of no return, whenever the operation is looked at and stands there."""
        self.is_awaited, self.weights_id, self.is_whole = not self.is_given, weights_id, is_whole
        return self.is_given


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asked, and under which call id the answer goes back."""

    client: bytes
    call_id: str


@dataclass(frozen=True, slots=True)
class Moment:
    """What an operation sees of the engine when it is looked at."""

    blockers: dict[str, int]
    waited_s: float
    has_expired: bool


class Operation(Protocol):
    """A small state machine: looked at every turn until it answers."""

    kind: str
    is_exclusive: bool  # begins only when no earlier exclusive operation is pending: weights and memory

    @property
    def phase(self) -> str:
        """Where it is, in one word, for `GET /control/operations`."""
        ...

    @property
    def hold(self) -> Hold:
        """What it keeps from running now."""
        ...

    @property
    def is_polling(self) -> bool:
        """Whether it waits for something that sends no message: a sleeping loop must look now and then."""
        ...

    def in_flight(self) -> dict[str, int]:
        """Blockers: an operation that waits is none, one that is being carried out is."""
        ...

    def look(self, moment: Moment) -> ToClient | None:
        """The answer, if there is one now. Must answer when `moment.has_expired`."""
        ...

    def cancelled(self, moment: Moment, reason: str) -> ToClient:
        """The answer of an operation that ends early, for `reason`. What was applied stays applied."""
        ...


@dataclass(slots=True)
class PendingOperation:
    """An operation with its caller and its deadline, which runs from the arrival of the call."""

    operation_id: str
    operation: Operation
    caller: Caller
    arrived_s: float
    deadline: Deadline
    expires_at_s: float | None = None  # nobody waits for it from then on: it is given up
    permit: Permit = field(default_factory=Permit)
    is_decided: bool = False  # on several engines, so that none may leave it any more
    has_seen_deadline: bool = False  # it was looked at after its deadline, and waits on for something else

    @property
    def phase(self) -> str:
        return "prepared" if self.permit.is_awaited else self.operation.phase

    def commit(self) -> None:
        """All engines could: carry it out, however long that takes."""
        self.is_decided = self.permit.is_given = True
        self.expires_at_s = None
        self.deadline = Deadline(self.deadline.at_s + COMMITTED_S)

    def has_expired(self, clock: Clock) -> bool:
        return self.expires_at_s is not None and clock.now() >= self.expires_at_s

    def moment(self, clock: Clock, blockers: dict[str, int]) -> Moment:
        return Moment(blockers, clock.now() - self.arrived_s, self.deadline.has_passed(clock))
