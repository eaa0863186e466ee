"""A trace of each request by OpenTelemetry: one span, with its stages as children (docs/logs.md).

Spans are made when a request has ended, from its record, so tokens cost nothing. This module needs the extra `otel`; it
is imported only with `--enable-trace`.
"""

import os
import threading
import time
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from headwater.generation.text_generation import TextGeneration
from headwater.http_api.monitoring.request_log import is_worth_a_line
from headwater.http_api.monitoring.request_record import RequestRecord, finish_of
from headwater.version import version

EXPORTER = "OTEL_TRACES_EXPORTER"
EXPORTERS = ("otlp", "console", "none")
CLOSING_S = 1.0  # for the last spans to leave, within the time that a server has to end
_S = 1_000_000_000


class Tracing:
    """Makes the spans of requests that have ended."""

    def __init__(self, processor: SpanProcessor | None) -> None:
        """`processor` gets the spans; None: they are dropped."""
        given = Resource.create()  # of OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
        own: dict[str, Any] = {SERVICE_NAME: "headwater", SERVICE_VERSION: version()}
        is_named = not str(given.attributes.get(SERVICE_NAME, "")).startswith("unknown_service")
        resource = Resource(own).merge(given) if is_named else given.merge(Resource(own))
        # The sampler is that of OTEL_TRACES_SAMPLER. At the exit of Python, the provider would wait for a collector.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        if processor is not None:
            self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("headwater", version())

    @classmethod
    def from_environment(cls) -> "Tracing":
        """With the exporter of OpenTelemetry's variables. ValueError for a kind that we have not."""
        kind = os.environ.get(EXPORTER, "") or "otlp"
        if kind not in EXPORTERS:
            raise ValueError(f"{EXPORTER} must be one of {', '.join(EXPORTERS)}, got {kind!r}")
        if kind == "none":
            return cls(None)
        return cls(BatchSpanProcessor(OTLPSpanExporter() if kind == "otlp" else ConsoleSpanExporter()))

    def close(self) -> None:
        """Send what has not been sent, for a second at most: a collector that is away holds up no shutdown."""
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(CLOSING_S)

    def ended(self, record: RequestRecord) -> None:
        """Make the span of `record`, unless the request only read something."""
        if not is_worth_a_line(record):
            return
        now_ns, now_s = time.time_ns(), time.monotonic()
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in record.scope["headers"]}
        span = self._tracer.start_span(
            f"{record.scope['method']} {record.scope['path']}",
            context=propagate.extract(headers),
            kind=SpanKind.SERVER,
            start_time=now_ns - int(record.duration_s * _S),
            attributes=_attributes(record),
        )
        record.trace_id = f"{span.get_span_context().trace_id:032x}"
        if span.is_recording():
            inside = trace.set_span_in_context(span)
            for index, generation in enumerate(record.generations):
                started_ns = now_ns - int((now_s - generation.started_s) * _S)
                self._add_stages(inside, index, generation, started_ns)
        if record.status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(now_ns)

    def _add_stages(self, inside: Context, index: int, generation: TextGeneration, started_ns: int) -> None:
        begins_ns = started_ns
        for name, seconds in generation.stages()._asdict().items():
            ends_ns = begins_ns + int(seconds * _S)
            if seconds > 0:
                attributes = {"headwater.generation": index}
                span = self._tracer.start_span(name[:-2], context=inside, start_time=begins_ns, attributes=attributes)
                span.end(ends_ns)
            begins_ns = ends_ns


def _attributes(record: RequestRecord) -> dict[str, Any]:
    scope = record.scope
    found: dict[str, Any] = {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "http.response.status_code": record.status,
        "headwater.request_id": record.request_id,
    }
    if scope.get("client"):
        found["client.address"] = scope["client"][0]
    generations = record.generations
    if generations:
        metas = [generation.meta for generation in generations if generation.meta is not None]
        found |= {
            "gen_ai.provider.name": "headwater",
            "gen_ai.request.model": record.model_name,
            "gen_ai.usage.input_tokens": sum(generation.num_prompt_tokens for generation in generations),
            "gen_ai.usage.output_tokens": sum(len(generation.token_ids) for generation in generations),
            "gen_ai.response.finish_reasons": [finish_of(generation) for generation in generations],
            "headwater.cached_tokens.device": sum(meta.cached_device for meta in metas),
            "headwater.cached_tokens.host": sum(meta.cached_host for meta in metas),
            "headwater.cached_tokens.storage": sum(meta.cached_storage for meta in metas),
            "headwater.engine": generations[0].engine,
        }
    return found
