"""A control request that runs when its condition holds, or fails at its deadline."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from headwater.clock import Clock, Deadline
from headwater.messages.wire import ToClient


class Hold(IntEnum):
    """What an operation keeps from running while it is pending."""

    NOTHING = 0
    STARTS = 1  # requests that have never started stay queued
    ALL = 2  # no step is launched


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
    has_seen_deadline: bool = False  # it was looked at after its deadline, and waits on for something else

    def moment(self, clock: Clock, blockers: dict[str, int]) -> Moment:
        return Moment(blockers, clock.now() - self.arrived_s, self.deadline.has_passed(clock))
