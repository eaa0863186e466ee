"""Ollama's routes as desktop apps use them, through the app."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from api_under_test import CHAT_TEMPLATE, MODEL, TOKENIZER, api, calling, saying, until
from msgspec import structs
from scripted_replies import ScriptedReply, call

from headwater.generation.assistant_message import MessageDelta
from headwater.http_api.ollama.answer import OllamaAnswer
from headwater.messages.base import unpack_ids
from headwater.messages.generation import Finish, Generate
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
CHAT = {"model": f"{MODEL}:latest", "messages": [{"role": "user", "content": "hi"}]}
GENERATE = {"model": MODEL, "prompt": "hi"}
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def prompt_text(engine: ScriptedEngine) -> str:
    newest = engine.of_type(Generate)[-1]
    return TOKENIZER.decode(unpack_ids(newest.prompt_ids).tolist(), skip_special_tokens=False)


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


async def test_chat_streams_lines_by_default(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    engine.script.step_s = 0.001
    async with api(engine) as server:
        *said, last = lines(await server.post("/api/chat", CHAT))
        whole = (await server.post("/api/chat", CHAT | {"stream": False})).json()
    assert "".join(line["message"]["content"] for line in said) == "hello" == whole["message"]["content"]
    assert all(line["done"] is False and line["model"] == CHAT["model"] for line in said)
    for ended in (last, whole):
        assert (ended["done"], ended["done_reason"]) == (True, "stop")
        assert (ended["prompt_eval_count"], ended["eval_count"]) == (4, 6)
        assert all(isinstance(ended[name], int) and ended[name] >= 0 for name in DURATIONS)
        assert ended["total_duration"] >= ended["prompt_eval_duration"] + ended["eval_duration"] - 2
    assert prompt_text(engine) == "<|user|>hi<|assistant|>"


async def test_generate_with_the_template_and_raw(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    async with api(engine) as server:
        *said, last = lines(await server.post("/api/generate", GENERATE | {"system": "be kind"}))
        assert prompt_text(engine) == "<|user|>be kind<|user|>hi<|assistant|>"
        raw = {"raw": True, "stream": False, "prompt": "<|user|>hi", "options": {"num_predict": 2}}
        whole = (await server.post("/api/generate", GENERATE | raw)).json()
        assert prompt_text(engine) == "<|user|>hi"
    assert "".join(line["response"] for line in said) == "hello"
    assert (last["response"], last["done"]) == ("", True)
    assert (whole["response"], whole["done_reason"]) == ("he", "length")


@pytest.mark.parametrize(
    ("path", "more"), [("chat", CHAT), ("generate", GENERATE), ("generate", GENERATE | {"raw": True})]
)
async def test_logprobs_of_a_stream_are_those_of_the_whole(engine: ScriptedEngine, path: str, more: dict) -> None:
    engine.script.reply = saying("hé")
    body = more | {"logprobs": True, "top_logprobs": 2}
    async with api(engine) as server:
        whole = (await server.post(f"/api/{path}", body | {"stream": False})).json()["logprobs"]
        streamed = lines(await server.post(f"/api/{path}", body))
        wrong = await server.post(f"/api/{path}", more | {"top_logprobs": 2})
    assert whole[0]["token"] == "h"
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * 4
    assert [entry for line in streamed for entry in line.get("logprobs", ())] == whole
    assert wrong.status_code == 400


async def test_a_request_without_content_loads_the_model(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        chat = (await server.post("/api/chat", {"model": MODEL})).json()
        generate = (await server.post("/api/generate", {"model": MODEL, "keep_alive": -1})).json()
    assert (chat["done_reason"], generate["done_reason"]) == ("load", "load")
    assert engine.of_type(Generate) == []


async def test_curl_sends_no_json_header(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    form = {"content-type": "application/x-www-form-urlencoded"}
    async with api(engine) as server:
        response = await server.http.post("/api/chat", content=json.dumps(CHAT), headers=form)
        bare = await server.http.post("/api/show", content=json.dumps({"model": MODEL}))
    assert lines(response)[-1]["done"] is True
    assert bare.status_code == 200


async def test_the_model_is_listed_and_shown(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        (listed,) = (await server.http.get("/api/tags")).json()["models"]
        (running,) = (await server.http.get("/api/ps")).json()["models"]
        shown = (await server.post("/api/show", {"model": listed["name"]})).json()
        version = (await server.http.get("/api/version")).json()["version"]
    assert listed["name"] == listed["model"] == running["name"] == f"{MODEL}:latest"
    assert listed["size"] == 1 << 20
    assert len(listed["digest"]) == 64
    assert (running["size_vram"], running["context_length"]) == (0, 256)
    family = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{family}.context_length"] == 256
    assert shown["template"] == CHAT_TEMPLATE
    assert "completion" in shown["capabilities"]
    assert tuple(map(int, version.split("."))) >= (0, 6, 4), "clients refuse older ones"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/chat", CHAT | {"model": "other"}, 404),
        ("/api/chat", {"messages": CHAT["messages"]}, 400),
        ("/api/generate", GENERATE | {"model": "other:latest"}, 404),
        ("/api/show", {"model": "other"}, 404),
        ("/api/show", {}, 404),
        ("/api/chat", CHAT | {"options": {"num_ctx": 10_000}}, 400),
        ("/api/pull", {"model": MODEL}, 404),
    ],
)
async def test_errors_are_texts(engine: ScriptedEngine, path: str, body: dict[str, Any], status: int) -> None:
    async with api(engine) as server:
        response = await server.post(path, body)
    assert response.status_code == status
    assert isinstance(response.json()["error"], str)
    assert engine.of_type(Generate) == []


async def test_an_aborted_stream_ends_with_an_error_line(engine: ScriptedEngine) -> None:
    engine.script.step_s = 0.01
    async with api(engine) as server:
        running = asyncio.ensure_future(server.post("/api/chat", CHAT | {"rid": "mine"}))
        await until(lambda: engine.num_running)
        await asyncio.sleep(0.05)
        await server.post("/abort_request", {"rid": "mine"})
        *_, last = lines(await running)
    assert "ended before its answer was whole" in last["error"]


async def test_an_engine_that_refuses_is_an_error_also_for_a_stream(engine: ScriptedEngine) -> None:
    engine.script.refusal = Finish(type="abort", status=429, message="the queue is full")
    async with api(engine) as server:
        assert (await server.post("/api/chat", CHAT)).status_code == 429


async def test_a_call_of_a_tool(engine: ScriptedEngine) -> None:
    engine.ready = structs.replace(engine.ready, max_context=4096, num_pages=512)
    engine.script.reply = calling("look", {"at": "é"})
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    async with api(engine) as server:
        *said, last = lines(await server.post("/api/chat", CHAT | {"tools": tools}))
        (call,) = [call for line in said for call in line["message"].get("tool_calls", ())]
        assert call["function"] == {"index": 0, "name": "look", "arguments": {"at": "é"}}
        assert last["done_reason"] == "stop"
        result = {"role": "tool", "tool_name": "look", "content": "a river"}
        messages = [*CHAT["messages"], {"role": "assistant", "content": "", "tool_calls": [call]}, result]
        assert (await server.post("/api/chat", CHAT | {"messages": messages, "tools": tools})).status_code == 200
        assert "tools" in (await server.post("/api/show", {"model": MODEL})).json()["capabilities"]
    assert "a river" in prompt_text(engine)


def answer(*deltas: MessageDelta) -> OllamaAnswer:
    reply: Any = ScriptedReply(*deltas)
    return OllamaAnswer("m", reply, is_chat=True, arrived_s=0.0)


async def test_thinking_is_apart_and_calls_come_whole() -> None:
    deltas = (
        MessageDelta(reasoning="so"),
        MessageDelta(content="I look"),
        MessageDelta(tool_calls=tuple(call(0, "f", '{"a"', ": 1}"))),
        MessageDelta(tool_calls=tuple(call(1, "g", "no"))),
        MessageDelta(),
    )
    whole = (await answer(*deltas).collect())["message"]
    calls = [
        {"id": "call_0", "function": {"index": 0, "name": "f", "arguments": {"a": 1}}},
        {"id": "call_1", "function": {"index": 1, "name": "g", "arguments": {"unparsed_arguments": "no"}}},
    ]
    assert whole == {"role": "assistant", "content": "I look", "thinking": "so", "tool_calls": calls}
    streamed = [json.loads(line)["message"] async for line in answer(*deltas).lines()]
    assert [message["tool_calls"] for message in streamed if "tool_calls" in message] == [[calls[0]], [calls[1]]]
    assert "".join(message.get("thinking", "") for message in streamed) == "so"
