"""One line in the log for each operation that an engine has answered (docs/logs.md)."""

import logging
from collections.abc import Iterator
from typing import Any

from headwater.logs import log_event
from headwater.messages.base import Answer

log = logging.getLogger("headwater.operation")
_NAMES = (
    "status", "success", "mode", "dry_run", "drained", "generation", "blockers", "pending", "still_warm",
    "paused", "num_requests", "weights_id", "weight_version", "param",
)  # fmt: skip
_READING = ("get_", "checksums")  # kinds that change nothing


def log_operation(kind: str, answer: Answer, *, waited_s: float, operation_id: str = "") -> None:
    """`operation_id` is empty for an operation that was answered in the turn of its call."""
    level = logging.DEBUG if kind.startswith(_READING) else logging.INFO
    if log.isEnabledFor(level):
        fields = {"kind": kind, "operation_id": operation_id or None, "call_id": answer.call_id, "waited_s": waited_s}
        log_event(log, level, "operation", fields | dict(_facts(answer)))


def _facts(answer: Answer) -> Iterator[tuple[str, Any]]:
    """What the answer says, without what is empty, and pages as one number a tier."""
    if text := getattr(answer, "message", ""):  # `message` is that of the line
        yield "answer", text
    for name in _NAMES:
        value = getattr(answer, name, None)
        if value is not None and value != "" and value != () and value != {}:
            yield name, value
    for name in ("freed", "retired"):
        amounts = getattr(answer, name, None)
        if isinstance(amounts, dict) and amounts:
            yield f"{name}_pages", {tier: amount.pages for tier, amount in amounts.items()}
