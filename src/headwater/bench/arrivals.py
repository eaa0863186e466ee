"""When sessions begin: as the workload says (open loop), or when another one ends (closed loop). Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from headwater.planning.trace import PlannedRequest


@dataclass(frozen=True, slots=True)
class NumberedRequest:
    """A request with its index in the workload, which makes its text its own."""

    number: int
    request: PlannedRequest


@dataclass(frozen=True, slots=True)
class Session:
    """Requests that follow one another. A request without a session is one by itself."""

    begins_s: float  # after the start of the round
    turns: tuple[NumberedRequest, ...]


def sessions_of(trace: Sequence[PlannedRequest]) -> list[Session]:
    """The sessions of a workload in the order of their beginnings."""
    turns: dict[str, list[NumberedRequest]] = {}
    for number, request in enumerate(trace):
        name = request.session or f"\0request {number}"
        turns.setdefault(name, []).append(NumberedRequest(number, request))
    found = [Session(each[0].request.arrival_s, tuple(each)) for each in turns.values()]
    return sorted(found, key=lambda session: session.begins_s)


def from_zero(sessions: Sequence[Session]) -> list[Session]:
    """The same, with the first one at 0: a trace that begins later would make the load wait."""
    first_s = min(session.begins_s for session in sessions)
    return [replace(session, begins_s=session.begins_s - first_s) for session in sessions]


def faster(trace: Sequence[PlannedRequest], speed: float) -> list[PlannedRequest]:
    """The trace with arrivals and pauses divided by `speed`. ValueError unless it is above 0."""
    if not 0 < speed < float("inf"):
        raise ValueError(f"trace-speed must be above 0, found {speed}")
    return [
        msgspec.structs.replace(request, arrival_s=request.arrival_s / speed, think_s=request.think_s / speed)
        for request in trace
    ]


def due_s(session: Session, turn: int, *, previous_ended_s: float) -> float:
    """When a turn is to be sent, in seconds of the round: at its arrival, but not before the pause after an answer."""
    request = session.turns[turn].request
    if turn == 0:
        return session.begins_s
    arrival_s = request.arrival_s - session.turns[0].request.arrival_s + session.begins_s
    return max(arrival_s, previous_ended_s + request.think_s)
