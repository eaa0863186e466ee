"""A run as data: the events of its engines in order, for a JSON file, for replay and for shortening."""

from typing import Literal

import msgspec

from headwater.messages.generation import Generate
from headwater.messages.wire import ToEngine
from headwater.simulation.engine_shape import EngineShape


class Turns(msgspec.Struct, tag="turns", frozen=True):
    """All engines turn `count` times; their clocks advance by `advance_s` after each turn."""

    count: int
    advance_s: float


class Deliver(msgspec.Struct, tag="deliver", frozen=True):
    """A message for an engine's next turn."""

    message: ToEngine
    client: str
    engine: int = 0


class FollowUp(msgspec.Struct, tag="follow_up", frozen=True):
    """The next turn of a conversation: prompt and text of `parent`, then the prompt of `message`."""

    message: Generate
    client: str
    parent: str
    engine: int = 0


class Faults(msgspec.Struct, tag="faults", frozen=True):
    """The faults from now on; none by default."""

    copy_polls: int = 0  # most turns of a copy
    copy_failures: float = 0.0
    job_polls: int = 0  # most turns of a store call
    job_hangs: float = 0.0
    staging_polls: int = 1  # polls until new weights are read
    store_fails: float = 0.0
    store_writes_late: float = 0.0
    store_flips: float = 0.0
    store_full: float = 0.0
    store_is_read_only: bool = False
    copy_hangs: float = 0.0  # copies that take several hundred turns
    store_truncates: float = 0.0
    store_loses: float = 0.0
    step_faults: float = 0.0  # steps that raise
    not_finite: float = 0.0  # rows whose logits are not finite


class ComeBack(msgspec.Struct, tag="come_back", frozen=True):
    """Hanging store calls return, and late writes arrive."""


class Crash(msgspec.Struct, tag="crash", frozen=True):
    """An engine dies and restarts: its cache is empty, its clients have got an error, and the store stays."""

    engine: int = 0


Event = Turns | Deliver | FollowUp | Faults | ComeBack | Crash


class Trace(msgspec.Struct, frozen=True):
    """Everything that determines a run."""

    seed: int
    profile: str
    shapes: tuple[EngineShape, ...]  # of the engines, which share a store if they have one
    store_bytes: int  # 0: no store
    events: tuple[Event, ...]
    store_kind: Literal["memory", "file"] = "memory"


encode_trace = msgspec.json.Encoder().encode
decode_trace = msgspec.json.Decoder(Trace).decode


def describe(event: Event) -> str:
    """An event as one short line."""
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
