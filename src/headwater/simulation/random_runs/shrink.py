"""Shortens a failing run to the necessary events (delta debugging; Zeller and Hildebrandt, 2002)."""

from collections.abc import Callable, Sequence

import msgspec

from headwater.simulation.random_runs.events import Event, Trace, Turns
from headwater.simulation.random_runs.run import Failure, replay


def shrink(failure: Failure, *, may_go_on: Callable[[int], bool]) -> Failure:
    """The same broken promise with fewer events. Before each replay, `may_go_on` gets the number of events left."""
    best = failure
    num_parts = 2
    while len(best.trace.events) >= 2:
        events = best.trace.events
        size = -(-len(events) // num_parts)
        for start in range(0, len(events), size):
            if not may_go_on(len(best.trace.events)):
                return _shorter_turns(best)
            shorter = _fails_alike(best, (*events[:start], *events[start + size :]))
            if shorter is not None:
                best, num_parts = shorter, max(num_parts - 1, 2)
                break
        else:
            if size == 1:
                return _shorter_turns(best)
            num_parts = min(num_parts * 2, len(events))
    return best


def _shorter_turns(failure: Failure) -> Failure:
    """The failure with one turn instead of several, where it is still the same."""
    best = failure
    for index, event in enumerate(failure.trace.events):
        if isinstance(event, Turns) and event.count > 1:
            events: Sequence[Event] = best.trace.events
            one = Turns(1, event.advance_s)
            if index < len(events) and events[index] == event:
                best = _fails_alike(best, (*events[:index], one, *events[index + 1 :])) or best
    return best


def _fails_alike(failure: Failure, events: tuple[Event, ...]) -> Failure | None:
    """The failure of a run of `events`, if it breaks the same promise. Its trace ends there."""
    trace: Trace = msgspec.structs.replace(failure.trace, events=events)
    found = replay(trace).failure
    return found if found is not None and found.promise == failure.promise else None
