#!/usr/bin/env python3
"""Processor time that the log and the trace of one request cost the API process.

    request_log.py [--requests 20000] [--rounds 5]

A recorded request of one generation is reported again and again; each figure is the fastest round. The log writes to
/dev/null, and the exporter of the trace drops the spans. Without its library, traces are left out.
"""

import argparse
import logging
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from headwater.generation.text_generation import Stages
from headwater.http_api.monitoring.request_log import RequestLog
from headwater.http_api.monitoring.request_record import RequestRecord
from headwater.logs import HumanLines, JsonLines
from headwater.messages.generation import Finish, OutputMeta

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/chat/completions",
    "client": ("127.0.0.1", 50000),
    "headers": [(b"host", b"127.0.0.1:30000"), (b"content-type", b"application/json")],
}


def recorded() -> RequestRecord:
    generation: Any = SimpleNamespace(
        request=SimpleNamespace(rid="chatcmpl-0123456789abcdef", prompt_ids=[1] * 500),
        engine=0,
        num_prompt_tokens=500,
        token_ids=[1] * 200,
        meta=OutputMeta(prompt_tokens=500, cached_device=480, queue_time_s=0.002),
        finish=Finish(type="stop"),
        started_s=time.monotonic() - 2.0,
        first_s=time.monotonic() - 1.9,
        stages=lambda: Stages(0.001, 0.001, 0.098, 1.9),
    )
    record = RequestRecord("0123456789abcdef0123456789abcdef", SCOPE)
    record.status, record.model_name, record.generations = 200, "model", [generation]
    return record


def microseconds(report: Callable[[RequestRecord], None], *, requests: int, rounds: int) -> float:
    record, best = recorded(), float("inf")
    for _ in range(rounds):
        started_s = time.process_time()
        for _ in range(requests):
            report(record)
        best = min(best, (time.process_time() - started_s) / requests)
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sizes = {"requests": args.requests, "rounds": args.rounds}
    log = logging.getLogger("headwater")
    log.propagate = False
    with open("/dev/null", "w") as nowhere:
        handler = logging.StreamHandler(nowhere)
        log.addHandler(handler)
        for name, form in (("human", HumanLines()), ("json", JsonLines())):
            log.setLevel(logging.INFO)
            handler.setFormatter(form)
            print(f"log, {name:6} {microseconds(RequestLog().ended, **sizes):6.1f} us a request")
        log.setLevel(logging.WARNING)
        print(f"log, off    {microseconds(RequestLog().ended, **sizes):6.1f} us a request")
    if find_spec("opentelemetry") is not None:
        print(f"trace       {microseconds(traced(), **sizes):6.1f} us a request")


def traced() -> Callable[[RequestRecord], None]:
    # imported here: an extra
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    from headwater.http_api.monitoring.tracing import Tracing

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    return Tracing(BatchSpanProcessor(Nowhere())).ended


if __name__ == "__main__":
    main()
