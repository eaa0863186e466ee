"""A control request that runs when its condition holds, or fails at its deadline."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from headwater.clock import Clock, Deadline
from headwater.messages.base import Answer
from headwater.messages.control import Failed

COMMITTED_S = 3600.0  # a decided operation ends by itself; its deadline is no reason any more to give it up


class Hold(IntEnum):
    """What an operation keeps from running while it is pending."""

    NOTHING = 0
    STARTS = 1  # requests that have never started stay queued
    ALL = 2  # no step is launched


@dataclass(slots=True)
class Permit:
    """Whether an operation may carry out what it has checked. With several engines it waits until all have prepared."""

    is_given: bool = True
    is_awaited: bool = False  # all that can fail has been done
    is_reported: bool = False  # and its caller knows
    weights_id: str = ""  # that it would put in place
    is_whole: bool = True  # and every earlier weight is replaced

    def ask(self, *, weights_id: str = "", is_whole: bool = True) -> bool:
        """Whether to go on. An operation asks at the point of no return, every time it is looked at there."""
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

    count_blockers: Callable[[], dict[str, int]]
    waited_s: float
    has_expired: bool

    @property
    def blockers(self) -> dict[str, int]:
        """Counted when asked for, since most operations do not ask in most turns."""
        return self.count_blockers()


class Operation(ABC):
    """A small state machine: looked at every turn until it answers.

    Constructed as `Kind(message, engine, permit)` (control/operations.py), which changes nothing yet.
    """

    kind: str  # its name in `GET /control/operations`
    is_exclusive = False  # begins only when no earlier exclusive operation is pending: weights and memory
    ends: str | None = None  # kind of the pending operations that end, and are answered, before it is answered
    is_immediate = False  # with its permit given, it answers in the turn of its message, before what is pending

    @property
    def phase(self) -> str:
        """Where it is, in one word, for `GET /control/operations`."""
        return "queued"

    @property
    def hold(self) -> Hold:
        """What it keeps from running now."""
        return Hold.NOTHING

    @property
    def is_polling(self) -> bool:
        """Whether it waits for an event that sends no message: a sleeping loop must look now and then."""
        return False

    def in_flight(self) -> dict[str, int]:
        """Blockers: an operation that waits is none, one that is being carried out is."""
        return {}

    def arrive(self) -> Failed | None:
        """Called once, when the message is read: why it is refused, or None. A pause takes effect here."""
        return None

    @abstractmethod
    def look(self, moment: Moment) -> Answer | None:
        """The answer, if there is one now. Must answer when `moment.has_expired`."""

    @abstractmethod
    def cancelled(self, moment: Moment, reason: str) -> Answer:
        """The answer of an operation that ends early, for `reason`. What was applied stays applied."""


@dataclass(slots=True)
class PendingOperation:
    """An operation with its caller and its deadline, which runs from the arrival of the call."""

    operation_id: str
    operation: Operation
    caller: Caller
    arrived_s: float
    deadline: Deadline
    expires_at_s: float | None = None  # its caller no longer waits from then on: it is given up
    permit: Permit = field(default_factory=Permit)
    is_decided: bool = False  # on several engines, so that none may leave it any more
    has_seen_deadline: bool = False  # it was looked at after its deadline, and waits on for something else

    @property
    def phase(self) -> str:
        return "prepared" if self.permit.is_awaited else self.operation.phase

    def commit(self) -> None:
        """All engines have prepared: carry it out, however long that takes."""
        self.is_decided = self.permit.is_given = True
        self.expires_at_s = None
        self.deadline = Deadline(self.deadline.at_s + COMMITTED_S)

    def has_expired(self, clock: Clock) -> bool:
        return self.expires_at_s is not None and clock.now() >= self.expires_at_s

    def moment(self, clock: Clock, count_blockers: Callable[[], dict[str, int]]) -> Moment:
        return Moment(count_blockers, clock.now() - self.arrived_s, self.deadline.has_passed(clock))
