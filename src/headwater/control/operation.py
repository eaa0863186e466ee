"""A control request that runs when its condition holds, or fails at its deadline."""

from dataclasses import dataclass
from typing import Protocol

from headwater.clock import Clock, Deadline
from headwater.messages import ToClient


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

    @property
    def phase(self) -> str:
        """Where it is, in one word, for `GET /control/operations`."""
        ...

    @property
    def holds_starts(self) -> bool:
        """Whether requests that have never started are kept queued meanwhile."""
        ...

    def look(self, moment: Moment) -> ToClient | None:
        """The answer, if there is one now. Must answer when `moment.has_expired`."""
        ...

    def cancelled(self, moment: Moment) -> ToClient:
        """The answer to the caller of an operation that was cancelled. What was applied stays applied."""
        ...


@dataclass(slots=True)
class PendingOperation:
    """An operation with its caller and its deadline, which runs from the arrival of the call."""

    operation_id: str
    operation: Operation
    caller: Caller
    arrived_s: float
    deadline: Deadline

    def moment(self, clock: Clock, blockers: dict[str, int]) -> Moment:
        return Moment(blockers, clock.now() - self.arrived_s, self.deadline.has_passed(clock))
