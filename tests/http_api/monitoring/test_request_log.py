"""The log: one line a request with what operators look for, no text of clients, and no line that a client forged."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from api_under_test import MODEL, api

from headwater.http_api.monitoring.request_log import RequestLog
from headwater.logs import HumanLines, JsonLines, configure_logging, log_event
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
WORDS = {"text": "tell me a secret", "sampling_params": {"max_new_tokens": 3}}
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


class Lines:
    """The lines that a logger wrote, as JSON."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    def __call__(self, message: str = "request") -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._stream.getvalue().splitlines()]
        return [line for line in lines if line["message"] == message]

    @property
    def text(self) -> str:
        return self._stream.getvalue()


@pytest.fixture
def lines() -> Iterator[Lines]:
    log, stream = logging.getLogger("headwater"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield Lines(stream)
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)


async def test_a_request_has_one_line_with_what_happened(engine: ScriptedEngine, lines: Lines) -> None:
    headers = {"X-Request-Id": "order-66", "traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
    async with api(engine) as server:
        answer = await server.http.post("/generate", json=WORDS, headers=headers)
    (line,) = lines()
    assert answer.headers["x-request-id"] == line["request_id"] == "order-66"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/generate", 200)
    assert line["prompt_tokens"] == len("tell me a secret")
    assert line["output_tokens"] == 3
    assert line["finish"] == "length"
    assert line["trace_id"] == TRACE_ID
    assert line["model"] == "tiny/test-model"
    stages = sum(line[f"{stage}_s"] for stage in ("queue", "load", "prefill", "decode"))
    assert 0 < line["ttft_s"] <= stages + 1e-4 <= line["duration_s"] + 2e-4


async def test_a_stream_has_its_line_at_its_end(engine: ScriptedEngine, lines: Lines) -> None:
    async with api(engine) as server:
        await server.post("/v1/completions", {"model": MODEL, "prompt": "abc", "max_tokens": 4, "stream": True})
    (line,) = lines()
    assert (line["output_tokens"], line["status"]) == (4, 200)


async def test_several_generations_are_one_line(engine: ScriptedEngine, lines: Lines) -> None:
    async with api(engine) as server:
        await server.post("/v1/completions", {"model": MODEL, "prompt": ["ab", "cde"], "max_tokens": 2, "n": 2})
    (line,) = lines()
    assert (line["num_generations"], line["prompt_tokens"], line["output_tokens"]) == (4, 10, 8)


async def test_no_text_of_clients_is_logged(engine: ScriptedEngine, lines: Lines) -> None:
    async with api(engine) as server:
        await server.post("/generate", WORDS)
        await server.post("/generate", {"text": "another secret", "sampling_params": {"max_new_tokens": "secret"}})
        await server.http.post("/flush_cache?prefix=secret&dry_run=true")
    assert len(lines()) == 3
    assert "secret" not in lines.text


async def test_text_is_logged_if_asked_for(engine: ScriptedEngine, lines: Lines) -> None:
    async with api(engine, on_request_ended=(RequestLog(shows_text=True).ended,)) as server:
        answer = await server.post("/generate", WORDS)
    (line,) = lines()
    assert line["prompts"] == ["tell me a secret"]
    assert line["answers"] == [answer.json()["text"]]


@pytest.mark.parametrize(
    ("method", "path", "is_there"),
    [
        ("GET", "/metrics", False),
        ("GET", "/health", False),
        ("GET", "/v1/models", False),
        ("GET", "/flush_cache", True),
        ("POST", "/pause_generation", True),
        ("POST", "/nowhere", True),
    ],
)
async def test_what_only_reads_has_no_line(
    engine: ScriptedEngine, lines: Lines, method: str, path: str, is_there: bool
) -> None:
    async with api(engine) as server:
        answer = await server.http.request(method, path)
    assert [(line["path"], line["status"]) for line in lines()] == ([(path, answer.status_code)] if is_there else [])


async def test_a_refused_request_has_a_line(engine: ScriptedEngine, lines: Lines) -> None:
    async with api(engine, api_key="k") as server:
        await server.post("/generate", WORDS)
    (line,) = lines()
    assert line["status"] == 401
    assert "prompt_tokens" not in line


def record(message: str, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("headwater.x", logging.INFO, "", 0, message, (), None)
    made.fields = fields
    return made


FORGED = "a\nb\x1b[2J\u2028c=d e\"f"


@pytest.mark.parametrize("form", [HumanLines(), JsonLines()], ids=["human", "json"])
def test_a_value_begins_no_line_of_its_own(form: logging.Formatter) -> None:
    text = form.format(record("request", path=FORGED, request_id="2"))
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text


def test_people_read_pairs() -> None:
    text = HumanLines("engine 1").format(record("request", path="/generate", status=200, ok=True, blockers={"a": 1}))
    assert text.endswith(' INFO engine 1 headwater.x: request path=/generate status=200 ok=true blockers={"a":1}')


def test_no_field_hides_what_every_line_has() -> None:
    """An operation's `message` once replaced the name of its line, by which collectors choose."""
    with pytest.raises(AssertionError):
        log_event(logging.getLogger("headwater.x"), logging.INFO, "request", {"message": "hidden"})


def test_json_has_the_exception() -> None:
    try:
        raise RuntimeError("lost")
    except RuntimeError as error:
        made = logging.LogRecord("x", logging.ERROR, "", 0, "step %d failed", (3,), (RuntimeError, error, None))
    line = json.loads(JsonLines().format(made))
    assert (line["message"], line["level"]) == ("step 3 failed", "error")
    assert "RuntimeError: lost" in line["exception"]


def test_other_messages_are_json_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    stream = io.StringIO()
    configure_logging("info", "json", prefix="rank 1", stream=stream)
    logging.getLogger("headwater.engine").warning("a store is slow: %s", "disk")
    line = json.loads(stream.getvalue())
    assert {key: line[key] for key in ("level", "logger", "process", "message")} == {
        "level": "warning",
        "logger": "headwater.engine",
        "process": "rank 1",
        "message": "a store is slow: disk",
    }
