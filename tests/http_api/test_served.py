"""The app in a real server on 127.0.0.1: disconnects, large bodies, shutdown, the openai SDK."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from api_under_test import MODEL, PLAIN, call_in_loop_of, saying, served

from headwater.messages.control import CancelOperation, FlushCache
from headwater.messages.generation import Abort, Generate
from scripted_engine import ScriptedEngine

MESSAGE = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 250, "ignore_eos": True}
LONG = {"ignore_eos": True, "max_new_tokens": 250}
SOON_S = 5.0  # on a busy machine; the requests of those who leave would take 12 s


@pytest.fixture
def url(engine: ScriptedEngine) -> Iterator[str]:
    with served(engine) as (url, _):
        yield url


def send_and_hang_up(url: str, path: str, body: dict, *, after: threading.Event | None, engine, method="POST") -> None:
    """Send a request on a socket of its own; close it once the engine has the request."""
    parts = urlsplit(url)
    content = json.dumps(body).encode()
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        engine.wait_for(Generate if path != "/flush_cache?timeout=60" else FlushCache)
        if after is None:
            connection.recv(4096)  # the stream has begun


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a", "sampling_params": LONG, "stream": True}),
        ("/generate", {"text": "a", "sampling_params": LONG}),
        ("/generate", {"text": ["a", "b"], "sampling_params": LONG, "stream": True}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True, "n": 3},
        ),
        ("/v1/responses", {"input": "a", "ignore_eos": True, "stream": True}),
        ("/v1/responses", {"input": "a", "ignore_eos": True}),
        ("/v1/messages", MESSAGE | {"stream": True}),
        ("/v1/messages", MESSAGE),
        ("/api/chat", {"model": "default", "messages": MESSAGE["messages"], "stream": True}),
        ("/api/generate", {"model": "default", "prompt": "a", "stream": False}),
    ],
)
def test_a_client_that_leaves_frees_its_requests_soon(
    engine: ScriptedEngine, url: str, path: str, body: dict
) -> None:
    engine.script.step_s = 0.05
    is_stream = body.get("stream", False)
    send_and_hang_up(url, path, body, after=None if is_stream else threading.Event(), engine=engine)
    left_s = time.monotonic()
    engine.wait_for(Abort, count=len(engine.of_type(Generate)), timeout_s=SOON_S)
    while engine.num_running:
        assert time.monotonic() - left_s < SOON_S
        time.sleep(0.005)


def test_a_client_that_leaves_while_its_request_waits_frees_it(engine: ScriptedEngine, url: str) -> None:
    """Nothing has been sent yet, so no failing write could tell."""
    engine.script.is_stalled = True
    body = {"text": "a", "stream": True}
    send_and_hang_up(url, "/generate", body, after=threading.Event(), engine=engine)
    engine.wait_for(Abort, timeout_s=SOON_S)


def test_a_caller_who_leaves_cancels_its_pending_flush(engine: ScriptedEngine, url: str) -> None:
    engine.script.flush = lambda _: None
    send_and_hang_up(url, "/flush_cache?timeout=60", {}, after=threading.Event(), engine=engine)
    (cancel,) = engine.wait_for(CancelOperation, timeout_s=SOON_S)
    assert cancel.started_by_call == engine.of_type(FlushCache)[0].call_id


def test_a_10_mb_body_gets_its_413_through_a_real_connection(url: str) -> None:
    """A server that answers without reading would reset the connection under most clients."""
    response = httpx.post(f"{url}/generate", content=b"x" * (10 << 20), timeout=60, **PLAIN)
    assert response.status_code == 413
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    headers = {"transfer-encoding": "chunked", "content-type": "application/json"}
    pieces = iter([b"y" * (1 << 20)] * 10)
    connection.request("POST", "/generate", body=pieces, encode_chunked=True, headers=headers)
    assert connection.getresponse().status == 413
    connection.close()


def test_shutdown_ends_streams_with_an_error_event(engine: ScriptedEngine) -> None:
    engine.script.step_s = 0.02
    with (
        served(engine) as (url, state),
        httpx.stream(
            "POST",
            f"{url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "a"}], "stream": True, "ignore_eos": True},
            timeout=60,
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        call_in_loop_of(state, lambda: state.begin_shutdown(grace_s=0.05))
        rest = [line for line in lines if line]
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert (error["code"], error["retryable"]) == ("shutting_down", True)


def test_an_engine_that_dies_ends_streams_and_waiting_requests(engine: ScriptedEngine) -> None:
    engine.script.step_s = 0.02
    with served(engine) as (url, state), httpx.Client(timeout=60, **PLAIN) as http:
        answers: list[httpx.Response] = []
        body = {"text": "a", "sampling_params": LONG}
        waiting = threading.Thread(target=lambda: answers.append(http.post(f"{url}/generate", json=body)))
        waiting.start()
        with http.stream("POST", f"{url}/generate", json=body | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            engine.wait_for(Generate, count=2)
            call_in_loop_of(state, state.client.engine_gone, 0, "killed")
            rest = [line for line in lines if line]
        waiting.join(timeout=60)
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_gone"
        assert answers[0].status_code == 503
        assert http.get(f"{url}/health").status_code == 503


def test_hundreds_of_mixed_requests_are_all_answered(engine: ScriptedEngine, url: str) -> None:
    engine.script.step_s = 0.001
    outcomes: list[int | str] = []

    def run(number: int) -> None:
        body = {
            "text": "ab" * (number % 7 + 1),
            "rid": f"r{number}",
            "sampling_params": {"max_new_tokens": 20},
        }
        with httpx.Client(timeout=120, **PLAIN) as http:
            if number % 3 == 0:
                outcomes.append(http.post(f"{url}/generate", json=body).status_code)
                return
            with http.stream("POST", f"{url}/generate", json=body | {"stream": True}) as response:
                if number % 3 == 1:
                    outcomes.append("left")
                    return
                outcomes.append([line for line in response.iter_lines() if line][-1])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert sorted(map(str, outcomes)) == ["200"] * 50 + ["data: [DONE]"] * 50 + ["left"] * 50
    deadline_s = time.monotonic() + SOON_S
    while engine.num_running and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert engine.num_running == 0


@pytest.fixture
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
        yield sdk


def test_the_openai_sdk_chats_streams_completes_and_reads_errors(engine: ScriptedEngine, sdk: openai.OpenAI) -> None:
    engine.script.reply = saying("hello there")
    messages = [{"role": "user", "content": "hi"}]
    assert [model.id for model in sdk.models.list()] == [MODEL]
    assert sdk.models.retrieve(MODEL).id == MODEL
    chat = sdk.chat.completions.create(model=MODEL, messages=messages, seed=1, n=2, logprobs=True, top_logprobs=1)
    assert [choice.message.content for choice in chat.choices] == ["hello there"] * 2
    assert chat.choices[0].logprobs.content[0].token == "h"
    assert chat.usage.prompt_tokens_details.cached_tokens == 0
    stream = sdk.chat.completions.create(
        model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}, stop=[" t"]
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello"
    assert chunks[-1].usage.total_tokens == 4 + len("hello t")
    completion = sdk.completions.create(model=MODEL, prompt=[[65], [66]], max_tokens=5, logprobs=1, echo=True)
    assert len(completion.choices) == 2
    assert completion.choices[0].logprobs.token_logprobs[0] is None
    with pytest.raises(openai.NotFoundError) as caught:
        sdk.chat.completions.create(model="other", messages=messages)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        sdk.chat.completions.create(model=MODEL, messages=messages, temperature=-1)


def test_the_openai_sdk_may_walk_away_mid_stream(engine: ScriptedEngine, sdk: openai.OpenAI) -> None:
    engine.script.step_s = 0.02
    stream = sdk.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    engine.wait_for(Abort, timeout_s=SOON_S)
