"""The log of a page: what changed from one snapshot of an engine to the next, in words. Pure functions."""

from collections.abc import Iterator

from headwater.messages.snapshot import Snapshot
from headwater.messages.state import EngineState

_COUNTED = {  # counter -> words for it
    "num_failed": "request failed",
    "num_refused": "request was refused",
    "num_parked": "request was parked: the device had no page left",
    "pins_gave_way": "pin gave up its device pages to a request",
}
Happening = tuple[str, str]  # level (info, warning), text


def happenings(before: Snapshot | None, now: Snapshot | None, *, why_out: str = "") -> Iterator[Happening]:
    """What a reader should see of one engine. None: it did not answer, for the reason `why_out`."""
    if now is None:
        if before is not None:
            yield "warning", f"does not answer: {why_out}"
        return
    if before is None:
        yield "info", "answers"
        return
    if now.state.uptime_s < before.state.uptime_s:
        yield "warning", "was started again"
        return
    yield from _of_operations(before, now)
    yield from _of_states(before.state, now.state)
    yield from _of_stores(before, now)


def _of_states(before: EngineState, now: EngineState) -> Iterator[Happening]:
    retired = int(now.counters.get("retired_tokens", 0) - before.counters.get("retired_tokens", 0))
    num_retirements = now.generation - before.generation
    if num_retirements > 0:
        times = "" if num_retirements == 1 else f" in {num_retirements} flushes"
        yield "info", f"flushed {retired:,} tokens{times}; generation {now.generation}"
    if now.paused != before.paused:
        yield "info", "paused" if now.paused else "goes on"
    if now.released_memory != before.released_memory:
        released = ", ".join(now.released_memory).replace("_", " ")
        yield "info", f"released its memory: {released}" if released else "has its memory again"
    if now.weights_id != before.weights_id:
        yield "info", f"serves other weights: {now.weight_version}"
    for name, words in _COUNTED.items():
        count = int(now.counters.get(name, 0) - before.counters.get(name, 0))
        if count > 0:
            yield "warning", f"{count} × {words}" if count > 1 else f"one {words}"
    for name, value in now.counters.items():
        if name.startswith("dropped_tokens_") and value > before.counters.get(name, 0):
            cause = name.removeprefix("dropped_tokens_").replace("_", " ")
            yield "warning", f"{int(value - before.counters.get(name, 0)):,} tokens did not reach a tier: {cause}"


def _of_operations(before: Snapshot, now: Snapshot) -> Iterator[Happening]:
    known = {item.operation_id: item for item in before.operations}
    pending = {item.operation_id for item in now.operations}
    for item in now.operations:
        if item.operation_id not in known:
            yield "info", f"{item.kind.replace('_', ' ')} waits, {item.phase.replace('_', ' ')}"
    for name, item in known.items():
        if name not in pending:
            yield "info", f"{item.kind.replace('_', ' ')} is no longer pending"


def _of_stores(before: Snapshot, now: Snapshot) -> Iterator[Happening]:
    if now.storage.kind != before.storage.kind:
        yield "info", f"a store was attached: {now.storage.kind}" if now.storage.kind else "the store was detached"
    elif now.storage.breaker != before.storage.breaker:
        is_bad = now.storage.breaker != "closed"
        yield "warning" if is_bad else "info", f"the store's circuit breaker is {now.storage.breaker.replace('_', ' ')}"
    pins, known = ({pin.pin_id for pin in each.pins} for each in (now, before))
    for name in sorted(pins - known):
        yield "info", f"{name} was set"
    for name in sorted(known - pins):
        yield "info", f"{name} ended"
