"""What is called when a request has ended: the tracer if there is one, and the log."""

from collections.abc import Callable
from typing import Protocol

from headwater.http_api.monitoring.request_log import RequestLog
from headwater.http_api.monitoring.request_record import RequestRecord
from headwater.launch.config import ServerArgs


class Tracer(Protocol):
    """`http_api.monitoring.tracing.Tracing`, whose library may be missing."""

    def ended(self, record: RequestRecord) -> None: ...

    def close(self) -> None: ...


def open_tracer(args: ServerArgs) -> Tracer | None:
    """None: requests are not traced. ValueError for an exporter that does not exist."""
    if not args.enable_trace:
        return None
    # imported here: an extra, and its import takes longer than that of many other parts
    from headwater.http_api.monitoring.tracing import Tracing

    return Tracing.from_environment()


def request_watchers(args: ServerArgs, tracer: Tracer | None) -> tuple[Callable[[RequestRecord], None], ...]:
    """For the server with these arguments. The tracer comes first: the log names its trace."""
    log = RequestLog(shows_text=args.log_prompts).ended
    return (log,) if tracer is None else (tracer.ended, log)
