"""Messages as Anthropic's clients send and read them, through the app."""

import asyncio
import json
from typing import Any

import pytest
from api_under_test import MODEL, TOKENIZER, api, byte_tokenizer, calling, named_events, saying, until
from msgspec import structs

from headwater.messages.base import unpack_ids
from headwater.messages.generation import Finish, Generate, OutputMeta
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
PATH = "/v1/messages"
BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}


def prompt_text(engine: ScriptedEngine) -> str:
    newest = engine.of_type(Generate)[-1]
    return TOKENIZER.decode(unpack_ids(newest.prompt_ids).tolist(), skip_special_tokens=False)


async def test_a_message(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    engine.script.meta = OutputMeta(prompt_tokens=4, cached_device=3)
    async with api(engine) as server:
        message = (await server.post(PATH, BODY | {"system": "be kind", "top_k": 3})).json()
    assert message["content"] == [{"type": "text", "text": "hello"}]
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", MODEL)
    assert message["stop_reason"] == "end_turn"
    assert message["usage"]["cache_read_input_tokens"] == 3
    assert prompt_text(engine) == "<|user|>be kind<|user|>hi<|assistant|>"
    (sent,) = engine.of_type(Generate)
    assert (sent.sampling.top_k, sent.sampling.max_new_tokens) == (3, 50)
    assert sent.rid == message["id"], "a client can abort by the id"


async def test_a_stream(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello STOP more")
    engine.script.step_s = 0.001
    async with api(engine) as server:
        response = await server.post(PATH, BODY | {"stream": True, "stop_sequences": ["STOP"]})
    events = named_events(response)
    text = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
    assert text == "hello "
    assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "STOP"}
    assert events[-1]["type"] == "message_stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_of_a_tool(engine: ScriptedEngine, *, stream: bool) -> None:
    engine.ready = structs.replace(engine.ready, max_context=4096, num_pages=512)
    engine.script.reply = calling("look", {"at": "é"})
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    async with api(engine) as server:
        response = await server.post(PATH, BODY | {"tools": tools, "stream": stream, "max_tokens": 500})
        if stream:
            events = named_events(response)
            pieces = [e["delta"].get("partial_json", "") for e in events if e["type"] == "content_block_delta"]
            assert json.loads("".join(pieces)) == {"at": "é"}
            assert events[-2]["delta"]["stop_reason"] == "tool_use"
            return
        message = response.json()
        said, call = message["content"]
        assert (said["text"], call["name"], call["input"]) == ("Well:", "look", {"at": "é"})
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "a river"}
        messages = [*BODY["messages"], {"role": "assistant", "content": message["content"]},
                    {"role": "user", "content": [result]}]  # fmt: skip
        assert (await server.post(PATH, BODY | {"tools": tools, "messages": messages})).status_code == 200
    assert "a river" in prompt_text(engine)


async def test_thinking_is_a_block_and_has_a_budget(engine: ScriptedEngine) -> None:
    thinker = byte_tokenizer("{{ messages[0]['content'] }}</think><|assistant|>", words=("<think>", "</think>"))
    engine.ready = structs.replace(engine.ready, vocab_size=thinker.vocab_size)
    ids = [*thinker.encode("<think>\nHm.\n</think>\n\nYes."), *thinker.eos_token_ids]
    engine.script.reply = lambda _: iter(ids)
    body = BODY | {"thinking": {"type": "enabled", "budget_tokens": 40}}
    async with api(engine, tokenizer=thinker) as server:
        message = (await server.post(PATH, body)).json()
        hidden = BODY | {"thinking": {"type": "adaptive", "display": "omitted"}}
        without = (await server.post(PATH, hidden)).json()
    thought, said = message["content"]
    assert (thought["type"], thought["thinking"], said["text"]) == ("thinking", "Hm.", "Yes.")
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] > 0
    assert [block["type"] for block in without["content"]] == ["text"]
    first, second = engine.of_type(Generate)
    assert first.grammar is not None
    assert (first.grammar.begins_within, second.grammar) == (40, None)


async def test_a_model_that_does_not_think_keeps_every_budget(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    async with api(engine) as server:
        thinking = {"type": "enabled", "budget_tokens": 1024}
        assert (await server.post(PATH, BODY | {"thinking": thinking})).status_code == 200


async def test_counting_tokens_is_counting_the_prompt(engine: ScriptedEngine) -> None:
    prompt = {"messages": BODY["messages"], "system": "be kind", "model": MODEL}
    async with api(engine) as server:
        counted = (await server.post(f"{PATH}/count_tokens", prompt)).json()
        message = (await server.post(PATH, prompt | {"max_tokens": 1})).json()
        unknown = await server.post(f"{PATH}/count_tokens", prompt | {"model": "other"})
    assert counted == {"input_tokens": message["usage"]["input_tokens"]}
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    assert len(engine.of_type(Generate)) == 1


async def test_a_last_message_of_the_assistant_is_continued(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("!")
    messages = [*BODY["messages"], {"role": "assistant", "content": [{"type": "text", "text": "so"}]}]
    async with api(engine) as server:
        assert (await server.post(PATH, BODY | {"messages": messages})).status_code == 200
    assert prompt_text(engine).endswith("hi<|user|>so")


@pytest.mark.parametrize(
    ("more", "status", "kind"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "a" * 300}]}, 400, "invalid_request_error"),
        ({"model": "other"}, 404, "not_found_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors(engine: ScriptedEngine, more: dict[str, Any], status: int, kind: str, *, stream: bool) -> None:
    async with api(engine) as server:
        response = await server.post(PATH, BODY | more | {"stream": stream})
    assert response.status_code == status
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert engine.of_type(Generate) == []


async def test_an_engine_that_refuses_is_an_error_also_for_a_stream(engine: ScriptedEngine) -> None:
    engine.script.refusal = Finish(type="abort", status=429, message="the queue is full")
    async with api(engine) as server:
        for stream in (False, True):
            response = await server.post(PATH, BODY | {"stream": stream})
            assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")


async def test_an_aborted_stream_ends_with_an_error_event(engine: ScriptedEngine) -> None:
    engine.script.step_s = 0.01
    async with api(engine) as server:
        running = asyncio.ensure_future(server.post(PATH, BODY | {"stream": True, "rid": "mine", "ignore_eos": True}))
        await until(lambda: engine.num_running)
        await asyncio.sleep(0.05)
        await server.post("/abort_request", {"rid": "mine"})
        response = await running
    events = named_events(response)
    assert (events[0]["type"], events[0]["message"]["id"]) == ("message_start", "mine")
    assert (events[-1]["type"], events[-1]["error"]["code"]) == ("error", "aborted")
