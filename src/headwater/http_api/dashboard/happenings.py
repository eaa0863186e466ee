"""The log of a page: what changed from one snapshot of an engine to the next, in words. Pure functions."""

from collections.abc import Iterator

from headwater.http_api.dashboard.store_trouble import happened
from headwater.messages.cache import StorageInfo
from headwater.messages.snapshot import Snapshot
from headwater.messages.state import EngineState

_COUNTED = {  # counter -> words for it
    "num_failed": "request failed",
    "num_refused": "request was refused",
    "num_parked": "request was parked: the device had no page left",
    "pins_gave_way": "pin gave up its device pages to a request",
}
_OF_STORES = ("persist_", "prefetch_")  # causes of dropped tokens
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
    yield from _of_drops(before, now)
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


def _of_drops(before: Snapshot, now: Snapshot) -> Iterator[Happening]:
    """Of a store in trouble the log has one line, not one a second."""
    known = before.state.counters
    for name, value in now.state.counters.items():
        cause = name.removeprefix("dropped_tokens_")
        if cause == name or value <= known.get(name, 0):
            continue
        if now.storage.trouble is None or not cause.startswith(_OF_STORES):
            num_tokens = int(value - known.get(name, 0))
            yield "warning", f"{num_tokens:,} tokens did not reach a tier: {cause.replace('_', ' ')}"


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
    else:
        yield from _of_trouble(before.storage, now.storage)
    pins, known = ({pin.pin_id for pin in each.pins} for each in (now, before))
    for name in sorted(pins - known):
        yield "info", f"{name} was set"
    for name in sorted(known - pins):
        yield "info", f"{name} ended"


def _of_trouble(before: StorageInfo, now: StorageInfo) -> Iterator[Happening]:
    known, trouble = before.trouble, now.trouble
    if trouble is None:
        if known is not None:
            yield "info", "the store answers again"
    elif known is None or known.is_left_alone != trouble.is_left_alone:
        yield "warning", happened(now)
