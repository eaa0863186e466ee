"""One line in the log for each HTTP request that computes or changes something (docs/logs.md)."""

import logging

from headwater.http_api.monitoring.request_record import RequestRecord, generation_fields
from headwater.http_api.sites import CHANGING_BY_GET
from headwater.logs import log_event

log = logging.getLogger("headwater.request")
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class RequestLog:
    """Logs requests when they have ended. With `shows_text` also what was asked and answered."""

    def __init__(self, *, shows_text: bool = False) -> None:
        self._shows_text = shows_text

    def ended(self, record: RequestRecord) -> None:
        level = level_of(record)
        if not log.isEnabledFor(level):
            return
        scope = record.scope
        client = scope.get("client")
        fields = {
            "request_id": record.request_id,
            "trace_id": record.trace_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": record.status,
            "duration_s": record.duration_s,
            "client": client[0] if client else None,
            **generation_fields(record, shows_text=self._shows_text),
        }
        log_event(log, level, "request", fields)


def is_worth_a_line(record: RequestRecord) -> bool:
    """Whether the request computed or changed something, or failed."""
    return level_of(record) >= logging.INFO


def level_of(record: RequestRecord) -> int:
    """Errors of ours are warnings; what only reads (probes, scrapes, pages) is for debugging."""
    if record.status >= 500 and record.status != 503:
        return logging.WARNING
    path = record.scope["path"]
    is_reading = path not in CHANGING_BY_GET or path.startswith("/dashboard")
    is_reading = is_reading and record.scope["method"] in _READING
    return logging.DEBUG if is_reading else logging.INFO
