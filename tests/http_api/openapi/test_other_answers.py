"""Answers of the other APIs have the shapes that /openapi.json promises."""

from typing import Any

import msgspec
import pytest
from api_under_test import MODEL, api, saying

from headwater.http_api.openapi import other_answers
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
MESSAGES = [{"role": "user", "content": "hi"}]
OLLAMA = {"model": MODEL, "stream": False}
CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("/v1/responses", {"input": "hi"}, other_answers.ResponseObject),
    ("/v1/responses/input_tokens", {"input": "hi"}, other_answers.CountedInput),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}, other_answers.Message),
    ("/v1/messages/count_tokens", {"messages": MESSAGES}, other_answers.CountedTokens),
    ("/api/chat", OLLAMA | {"messages": MESSAGES}, other_answers.OllamaChatAnswer),
    ("/api/chat", {"model": MODEL}, other_answers.OllamaChatAnswer),
    ("/api/generate", OLLAMA | {"prompt": "hi"}, other_answers.OllamaGenerateAnswer),
    ("/api/show", {"model": MODEL}, other_answers.OllamaModel),
]


@pytest.mark.parametrize(("path", "body", "shape"), CASES)
async def test_answers(engine: ScriptedEngine, path: str, body: dict[str, Any], shape: Any) -> None:
    engine.script.reply = saying("hello")
    async with api(engine) as server:
        response = await server.post(path, body)
    assert response.status_code == 200, response.text
    msgspec.json.decode(response.content, type=shape)


async def test_reports(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    async with api(engine) as server:
        for path, shape in (
            ("/api/tags", other_answers.OllamaModels),
            ("/api/ps", other_answers.OllamaModels),
            ("/api/version", other_answers.OllamaVersion),
        ):
            msgspec.json.decode((await server.http.get(path)).content, type=shape)
        path = f"/v1/responses/{(await server.post('/v1/responses', {'input': 'hi'})).json()['id']}"
        msgspec.json.decode((await server.http.get(path)).content, type=other_answers.ResponseObject)
        msgspec.json.decode((await server.http.get(f"{path}/input_items")).content, type=other_answers.ItemPage)
        msgspec.json.decode((await server.http.delete(path)).content, type=other_answers.DeletedResponse)


async def test_lines(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    async with api(engine) as server:
        response = await server.post("/api/chat", {"model": MODEL, "messages": MESSAGES})
    lines = [msgspec.json.decode(line, type=other_answers.OllamaChatAnswer) for line in response.text.splitlines()]
    assert lines[-1].done and not lines[0].done
