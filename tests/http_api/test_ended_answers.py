"""An answer that somebody aborted, or whose step failed: an error on /v1, SGLang's native form on /generate."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import openai
import pytest
from api_under_test import PLAIN, Api, api, error_of, served, until
from loop_engines import LoopEngine, loop_engines, prompt_of

from headwater.simulation.fakes.runner import StepFault

pytestmark = pytest.mark.anyio
CHAT = {"messages": [{"role": "user", "content": "abcdefgh"}], "max_tokens": 200, "ignore_eos": True, "rid": "r"}
TEXT = {"prompt": prompt_of(1), "max_tokens": 200, "ignore_eos": True, "rid": "r"}
ROUTES = pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path) as (engine,):
        yield engine


async def aborted(server: Api, engine: LoopEngine, path: str, body: dict[str, Any]) -> httpx.Response:
    """Aborted when it has a few tokens."""
    engine.step_s = 0.01
    enough = engine.parts.scheduler.counters.generated_tokens + 6
    running = asyncio.ensure_future(server.post(path, body))
    await until(lambda: engine.parts.scheduler.counters.generated_tokens >= enough)
    await server.post("/abort_request", {"rid": "r"})
    engine.step_s = 0.0
    return await running


def payloads(response: httpx.Response) -> list[str]:
    assert response.status_code == 200
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line]


@ROUTES
async def test_an_aborted_answer_is_an_error_status(engine: LoopEngine, path: str, body: dict[str, Any]) -> None:
    async with api(engine) as server:
        response = await aborted(server, engine, path, body)
        error = error_of(response)
        assert (response.status_code, error["type"], error["code"]) == (499, "aborted", "aborted")
        assert "ended before its answer was whole" in error["message"]


@ROUTES
@pytest.mark.parametrize("n", [1, 3])
async def test_an_aborted_stream_ends_with_an_error_and_no_done(
    engine: LoopEngine, path: str, body: dict[str, Any], n: int
) -> None:
    async with api(engine) as server:
        *chunks, last = payloads(await aborted(server, engine, path, body | {"stream": True, "n": n}))
        assert json.loads(last)["error"]["code"] == "aborted" and not json.loads(last)["error"]["retryable"]
        assert len(chunks) > 2, "what came before has been told"
        assert all(choice["finish_reason"] is None for chunk in chunks for choice in json.loads(chunk)["choices"])
        await until(lambda: not engine.parts.scheduler.running)


@ROUTES
async def test_partial_text_is_given_to_those_who_ask_for_it(
    engine: LoopEngine, path: str, body: dict[str, Any]
) -> None:
    async with api(engine) as server:
        asked = body | {"return_partial_on_abort": True}
        response = await aborted(server, engine, path, asked)
        (choice,) = response.json()["choices"]
        assert (response.status_code, choice["finish_reason"]) == (200, "abort")
        assert response.json()["usage"]["completion_tokens"] > 1
        *_, before_last, last = payloads(await aborted(server, engine, path, asked | {"stream": True, "rid": "r2"}))
        assert json.loads(before_last)["choices"][0]["finish_reason"] == "abort" and last == "[DONE]"


@ROUTES
async def test_a_stream_aborted_before_its_first_token_has_the_errors_status(
    engine: LoopEngine, path: str, body: dict[str, Any]
) -> None:
    async with api(engine) as server:
        await server.post("/pause_generation", {"mode": "in_place"})
        running = asyncio.ensure_future(server.post(path, body | {"stream": True}))
        await until(lambda: engine.parts.scheduler.waiting)
        await server.post("/abort_request", {"rid": "r"})
        assert (await running).status_code == 499


async def test_generate_keeps_sglangs_form(engine: LoopEngine) -> None:
    body = {
        "input_ids": prompt_of(1),
        "sampling_params": {"max_new_tokens": 200, "ignore_eos": True},
        "rid": "r",
    }
    async with api(engine) as server:
        response = await aborted(server, engine, "/generate", body)
        assert response.status_code == 200
        assert response.json()["meta_info"]["finish_reason"]["type"] == "abort"
        *_, before_last, last = payloads(await aborted(server, engine, "/generate", body | {"stream": True}))
        assert json.loads(before_last)["meta_info"]["finish_reason"]["type"] == "abort" and last == "[DONE]"


def failing(engine: LoopEngine, *, after: int) -> None:
    """Let a step raise once so many tokens are there."""
    launch, num_tokens = engine.runner.launch, engine.parts.scheduler.counters

    def launch_or_raise(plan: Any) -> Any:
        if num_tokens.generated_tokens >= after:
            engine.runner.launch = launch  # type: ignore[method-assign]
            raise StepFault("on purpose")
        return launch(plan)

    engine.runner.launch = launch_or_raise  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", TEXT),
        ("/generate", {"input_ids": prompt_of(1), "sampling_params": {"max_new_tokens": 50, "ignore_eos": True}}),
    ],
)
async def test_a_failed_step_is_told_and_the_next_request_is_served(
    engine: LoopEngine, path: str, body: dict[str, Any]
) -> None:
    async with api(engine) as server:
        failing(engine, after=0)
        response = await server.post(path, body)
        error = error_of(response)
        assert (response.status_code, error["type"]) == (500, "engine_error")
        assert "StepFault: on purpose" in error["message"]
        engine.step_s = 0.02
        failing(engine, after=engine.parts.scheduler.counters.generated_tokens + 6)
        *chunks, last = payloads(await server.post(path, body | {"stream": True, "return_partial_on_abort": True}))
        if path == "/generate":  # SGLang ends streams with an error that way
            assert last == "[DONE]"
            *chunks, last = chunks
        assert json.loads(last)["error"]["type"] == "engine_error" and chunks
        engine.step_s = 0.0
        assert (await server.post(path, body)).status_code == 200
        assert (await server.http.get("/health_generate")).status_code == 200
        metrics = (await server.http.get("/metrics")).text
        assert "headwater_num_failed_steps_total{" in metrics


@pytest.mark.parametrize("max_context", [32, 35])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": None, "max_tokens": 0}),
        ("/v1/completions", {"prompt": None, "max_tokens": 0, "echo": True, "logprobs": 1}),
        ("/generate", {"input_ids": None, "sampling_params": {"max_new_tokens": 0}}),
        ("/cache/warm", {"input_ids": None}),
        ("/cache/pin", {"input_ids": None, "ttl_s": 5}),
    ],
)
async def test_a_prompt_of_the_whole_context_without_a_new_token(
    tmp_path: Path, path: str, body: dict[str, Any], max_context: int
) -> None:
    """Each of these once ended the engine, or would have, where the context is whole pages."""
    with loop_engines(tmp_path, max_context=max_context) as (engine,):
        async with api(engine) as server:
            (name,) = [name for name, value in body.items() if value is None]
            response = await server.post(path, body | {name: prompt_of(1, max_context)})
            assert response.status_code == 200, response.text
            response = await server.post(path, body | {name: prompt_of(1, max_context + 1)})
            assert response.status_code == 400
            assert "is longer than the model's context length" in error_of(response)["message"]
            assert (await server.http.get("/health_generate")).status_code == 200


def test_the_openai_sdk_raises(engine: LoopEngine) -> None:
    """Not a half answer that looks whole."""
    with (
        served(engine) as (url, _),
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=2, timeout=60) as client,
    ):
        engine.step_s = 0.01
        chat: Any = {"model": "default", "messages": CHAT["messages"], "max_tokens": 200}
        chat["extra_body"] = {"ignore_eos": True}
        stream = client.chat.completions.create(**chat, stream=True)
        assert next(stream).choices[0].finish_reason is None
        httpx.post(url + "/abort_request", json={"abort_all": True}, **PLAIN)
        with pytest.raises(openai.APIError, match="ended before its answer was whole"):
            list(stream)
        num_requests = engine.parts.scheduler.counters.num_finished
        with pytest.raises(openai.APIStatusError, match="ended before its answer was whole") as caught:
            _abort_soon(url, engine, lambda: client.chat.completions.create(**chat))
        assert caught.value.status_code == 499
        assert engine.parts.scheduler.counters.num_finished == num_requests + 1, "the SDK does not repeat it"


def _abort_soon(url: str, engine: LoopEngine, call: Callable[[], Any]) -> Any:
    def abort() -> None:
        while not engine.parts.scheduler.running:
            pass
        httpx.post(url + "/abort_request", json={"abort_all": True}, **PLAIN)

    thread = Thread(target=abort)
    thread.start()
    try:
        return call()
    finally:
        thread.join()
