"""Traces: one span a request with its stages inside, in the client's own trace."""

import threading

import pytest
from api_under_test import MODEL, api
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from headwater.http_api.monitoring.tracing import Tracing
from headwater.launch.config import ServerArgs
from headwater.messages.generation import OutputMeta
from headwater.server.extras import check_extras
from headwater.server.request_watchers import open_tracer
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
META = OutputMeta(
    prompt_tokens=6, cached_device=3, cached_host=2, cached_storage=1, queue_time_s=3e-5, load_time_s=2e-5
)  # shorter than any way of a first token, so that there is a prefill
WORDS = {"text": "abcdef", "sampling_params": {"max_new_tokens": 3}}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Tracing:
    for name in ("OTEL_TRACES_SAMPLER", "OTEL_SERVICE_NAME", "OTEL_PROPAGATORS", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    return Tracing(SimpleSpanProcessor(exporter))


def parents_and_children(exporter: InMemorySpanExporter) -> tuple[list[ReadableSpan], list[ReadableSpan]]:
    spans = exporter.get_finished_spans()
    return [s for s in spans if s.kind is SpanKind.SERVER], [s for s in spans if s.kind is not SpanKind.SERVER]


async def test_a_request_is_a_span_with_its_stages(
    engine: ScriptedEngine, exporter: InMemorySpanExporter, tracing: Tracing
) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-Id": "order-66"}
    engine.script.step_s = 0.01
    engine.script.meta = META
    async with api(engine, on_request_ended=(tracing.ended,)) as server:
        await server.http.post("/generate", json=WORDS | {"stream": True}, headers=headers)
    (span,), stages = parents_and_children(exporter)
    assert span.name == "POST /generate"
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert span.parent is not None and f"{span.parent.span_id:016x}" == PARENT_ID
    told = dict(span.attributes or {})
    assert told["gen_ai.usage.input_tokens"] == 6
    assert told["gen_ai.usage.output_tokens"] == 3
    assert told["headwater.request_id"] == "order-66"
    assert told["http.response.status_code"] == 200
    assert [told[f"headwater.cached_tokens.{tier}"] for tier in ("device", "host", "storage")] == [3, 2, 1]
    assert [stage.name for stage in stages] == ["queue", "load", "prefill", "decode"]
    lasted_ns = [stage.end_time - stage.start_time for stage in stages[:2]]
    assert lasted_ns == [pytest.approx(1e4, abs=2), pytest.approx(2e4, abs=2)]
    for stage in stages:
        assert stage.parent is not None and stage.parent.span_id == span.context.span_id
        assert span.start_time - 1_000_000 <= stage.start_time <= stage.end_time <= span.end_time + 1_000_000


async def test_each_generation_has_its_stages(
    engine: ScriptedEngine, exporter: InMemorySpanExporter, tracing: Tracing
) -> None:
    engine.script.meta = META
    async with api(engine, on_request_ended=(tracing.ended,)) as server:
        await server.post("/v1/completions", {"model": MODEL, "prompt": ["ab", "cd"], "max_tokens": 2})
    spans, stages = parents_and_children(exporter)
    assert len(spans) == 1
    assert {stage.attributes["headwater.generation"] for stage in stages if stage.attributes} == {0, 1}


async def test_probes_are_no_spans_and_errors_are(
    engine: ScriptedEngine, exporter: InMemorySpanExporter, tracing: Tracing
) -> None:
    async with api(engine, on_request_ended=(tracing.ended,), is_ready=False) as server:
        await server.http.get("/health")
        await server.http.get("/metrics")
        await server.post("/generate", WORDS)
    (span,), stages = parents_and_children(exporter)
    assert span.status.status_code is StatusCode.ERROR
    assert stages == []


async def test_a_client_that_samples_nothing_gets_nothing(
    engine: ScriptedEngine, exporter: InMemorySpanExporter, tracing: Tracing
) -> None:
    async with api(engine, on_request_ended=(tracing.ended,)) as server:
        headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
        await server.http.post("/generate", json=WORDS, headers=headers)
    assert exporter.get_finished_spans() == ()


def test_off_means_no_tracer_and_no_library() -> None:
    assert open_tracer(ServerArgs()) is None


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.server.extras.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'headwater\[otel\]'"):
        check_extras(ServerArgs(enable_trace=True))


def test_a_collector_that_hangs_holds_up_no_shutdown() -> None:
    """A server ends within 5 s of SIGTERM; with a collector that was away it took ten."""

    class Hanging(SpanProcessor):
        def __init__(self) -> None:
            self.begun, self.released = threading.Event(), threading.Event()

        def shutdown(self) -> None:
            self.begun.set()
            self.released.wait(60)

    processor = Hanging()
    Tracing(processor).close()
    assert processor.begun.is_set()
    assert not processor.released.is_set()
    processor.released.set()


def test_an_unknown_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(ValueError, match="OTEL_TRACES_EXPORTER must be one of otlp, console, none"):
        Tracing.from_environment()


def test_the_service_has_the_name_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    assert Tracing(None)._provider.resource.attributes["service.name"] == "chat"
    monkeypatch.delenv("OTEL_SERVICE_NAME")
    assert Tracing(None)._provider.resource.attributes["service.name"] == "headwater"
