"""A run as data: what happened to the engines, in order. Written as JSON, played again, cut shorter."""

from typing import Literal

import msgspec

from headwater.messages.generation import Generate
from headwater.messages.wire import ToEngine
from headwater.simulation.driver import EngineShape


class Turns(msgspec.Struct, tag="turns", frozen=True):
    """All engines turn `count` times; their clocks move by `advance_s` after each turn."""

    count: int
    advance_s: float


class Deliver(msgspec.Struct, tag="deliver", frozen=True):
    """A message for the next turn of an engine."""

    message: ToEngine
    client: str
    engine: int = 0


class FollowUp(msgspec.Struct, tag="follow_up", frozen=True):
    """The next turn of a conversation: prompt and text so far of `parent`, and then the prompt of `message`."""

    message: Generate
    client: str
    parent: str
    engine: int = 0


class Faults(msgspec.Struct, tag="faults", frozen=True):
    """How things go from now on. The defaults are no faults at all."""

    copy_polls: int = 0  # a copy takes up to so many turns
    copy_failures: float = 0.0
    job_polls: int = 0  # a call of the store takes up to so many turns
    job_hangs: float = 0.0
    staging_polls: int = 1  # looks until new weights are read
    store_fails: float = 0.0
    store_writes_late: float = 0.0
    store_flips: float = 0.0
    store_full: float = 0.0
    store_is_read_only: bool = False
    copy_hangs: float = 0.0  # copies that take some hundred turns
    store_truncates: float = 0.0
    store_loses: float = 0.0
    step_faults: float = 0.0  # steps that raise
    not_finite: float = 0.0  # rows whose logits are not finite


class ComeBack(msgspec.Struct, tag="come_back", frozen=True):
    """Calls of the store that hang come back, and writes that were thought lost arrive."""


class Crash(msgspec.Struct, tag="crash", frozen=True):
    """An engine dies and is started again: its cache is empty, its clients have been told, the store stays."""

    engine: int = 0


Event = Turns | Deliver | FollowUp | Faults | ComeBack | Crash


class Trace(msgspec.Struct, frozen=True):
    """Everything a run depends on."""

    seed: int
    profile: str
    shapes: tuple[EngineShape, ...]  # engines, which share a store if they have one
    store_bytes: int  # 0: no store
    events: tuple[Event, ...]
    store_kind: Literal["memory", "file"] = "memory"


encode_trace = msgspec.json.Encoder().encode
decode_trace = msgspec.json.Decoder(Trace).decode


def describe(event: Event) -> str:
    """One short line."""
    match event:
        case Turns():
            return f"{event.count} turns, {event.advance_s:g} s each"
        case Deliver() | FollowUp():
            fields = {k: v for k, v in msgspec.structs.asdict(event.message).items() if k != "sampling"}
            shown = ", ".join(f"{k}={_short(v)}" for k, v in fields.items() if v not in ("", None, False, (), b""))
            return f"engine {event.engine}, {event.client}: {type(event.message).__name__}({shown})"
        case _:
            return str(event)


def _short(value: object) -> str:
    match value:
        case bytes():
            return f"<{len(value) // 4} tokens>"
        case tuple() if value and isinstance(value[0], Generate):
            return " ".join(request.rid for request in value)
    return repr(value)
