"""The server's log: a line a message, for people or as JSON, with fields that programs read (docs/logs.md).

A message with fields is logged by `log_event`. Fields come from clients as well, so neither form lets a value begin a
line of its own.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal, TextIO

import msgspec

LogFormat = Literal["human", "json"]
Fields = Mapping[str, Any]
_PLAIN = re.compile(r"[^\s\"=\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# JSON leaves these as they are; some readers end a line at them
_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}
OF_EVERY_LINE = frozenset({"time", "level", "logger", "process", "message", "exception"})  # in JSON
_CHATTY = ("httpx", "asyncio", "filelock")
_encode = msgspec.json.Encoder(enc_hook=str).encode


def log_event(log: logging.Logger, level: int, name: str, fields: Fields) -> None:
    """Log the event `name`. Fields that are None are left out; numbers are rounded to microseconds."""
    assert fields.keys().isdisjoint(OF_EVERY_LINE), fields.keys()
    log.log(level, name, extra={"fields": {key: _short(value) for key, value in fields.items() if value is not None}})


def configure_logging(level: str, form: LogFormat, *, prefix: str = "", stream: TextIO | None = None) -> None:
    """Send the log of this process to standard error. `prefix` names the process among several."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines(prefix) if form == "json" else HumanLines(prefix))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


class HumanLines(logging.Formatter):
    """`2026-11-29 12:00:01,123 INFO headwater.x: request method=POST path=/generate status=200`."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__(f"%(asctime)s %(levelname)s {prefix + ' ' if prefix else ''}%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields: Fields = getattr(record, "fields", {})
        pairs = "".join(f" {key}={_in_words(value)}" for key, value in fields.items())
        return super().formatMessage(record) + pairs


class JsonLines(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `message`, then the fields of the event."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self._process = {"process": prefix} if prefix else {}

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        line |= getattr(record, "fields", {})
        return _encode(line).decode().translate(_ESCAPED)


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _in_words(value: Any) -> str:
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else json.dumps(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return _encode(value).decode()
