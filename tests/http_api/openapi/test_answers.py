"""Answers have the shapes that /openapi.json promises: every field is listed, and none is missing."""

import json
from typing import Any

import msgspec
import pytest
from api_under_test import Api, api

from headwater.http_api.openapi import answers
from headwater.messages.control import FlushCache, FlushResult, PagesAndBytes
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"messages": MESSAGES, "max_tokens": 4}
COMPLETION = {"prompt": ["ab", "cd"], "max_tokens": 4}
MORE = {"n": 2, "return_cached_tokens_details": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}


async def whole(server: Api, path: str, body: dict[str, Any], shape: Any) -> Any:
    response = await server.post(path, body)
    assert response.status_code == 200, response.text
    return msgspec.json.decode(response.content, type=shape)


async def events(server: Api, path: str, body: dict[str, Any], shape: Any) -> list[Any]:
    response = await server.post(path, body | {"stream": True})
    assert response.status_code == 200, response.text
    texts = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert texts.pop() == "[DONE]"
    return [msgspec.json.decode(text, type=shape) for text in texts]


@pytest.mark.parametrize("more", [{}, MORE, {"logprobs": True, "top_logprobs": 2}])
async def test_chat(engine: ScriptedEngine, more: dict[str, Any]) -> None:
    async with api(engine) as server:
        await whole(server, "/v1/chat/completions", CHAT | more, answers.ChatCompletion)
        found = await events(server, "/v1/chat/completions", CHAT | more | USAGE, answers.ChatCompletionChunk)
    assert found[0].choices[0].delta.role == "assistant" and found[-1].usage


@pytest.mark.parametrize("more", [{}, MORE, {"logprobs": 2, "echo": True}])
async def test_completions(engine: ScriptedEngine, more: dict[str, Any]) -> None:
    async with api(engine) as server:
        await whole(server, "/v1/completions", COMPLETION | more, answers.Completion)
        found = await events(server, "/v1/completions", COMPLETION | more | USAGE, answers.Completion)
    assert found[-1].usage and not found[-1].choices


async def test_models_tokens_and_native_answers(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        models = msgspec.json.decode((await server.http.get("/v1/models")).content, type=answers.ModelList)
        (card,) = models.data
        one = (await server.http.get(f"/v1/models/{card.id}")).content
        assert msgspec.json.decode(one, type=answers.ModelCard) == card
        for prompt in ("ab", ["ab", "c"]):
            tokens = await whole(server, "/tokenize", {"prompt": prompt}, answers.Tokens)
            await whole(server, "/detokenize", {"tokens": tokens.tokens}, answers.Text)
        await whole(server, "/generate", {"text": "ab"}, answers.Generated)
        await whole(server, "/generate", {"text": ["ab", "c"]}, list[answers.Generated])
        assert await events(server, "/generate", {"text": ["ab", "c"]}, answers.Generated)


@pytest.mark.parametrize("is_flushed", [True, False])
async def test_flushes(engine: ScriptedEngine, is_flushed: bool) -> None:
    def answer(message: FlushCache) -> FlushResult:
        amount = {"device": PagesAndBytes(pages=1, bytes=2)}
        status, blockers = (200, {}) if is_flushed else (400, {"running": 1})
        return FlushResult(
            call_id=message.call_id, status=status, success=is_flushed, message="text", mode="idle", waited_s=0.1,
            dry_run=message.dry_run, freed=amount, retired=amount, blockers=blockers,
        )  # fmt: skip

    engine.script.answers[FlushCache] = answer
    async with api(engine) as server:
        for query in ("", "?dry_run=true"):
            response = await server.http.post(f"/flush_cache{query}", headers={"accept": "application/json"})
            flushed = msgspec.json.decode(response.content, type=answers.FlushAnswer)
            assert flushed.success == is_flushed


async def test_errors(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for path, shape in (("/v1/messages", answers.AnthropicErrorAnswer), ("/api/chat", answers.OllamaErrorAnswer)):
            response = await server.post(path, {"model": "no", "messages": "no"})
            assert response.status_code == 400 and msgspec.json.decode(response.content, type=shape).error
        for response in (
            await server.post("/generate", {"text": 1}),
            await server.post("/v1/chat/completions", {"messages": MESSAGES, "model": "no"}),
            await server.http.get("/nowhere"),
            await server.http.put("/metrics"),
        ):
            error = msgspec.json.decode(response.content, type=answers.ErrorAnswer).error
            assert response.status_code >= 400 and error.message
            assert set(json.loads(response.content)["error"]) == {"message", "type", "param", "code"}
