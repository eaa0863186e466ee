"""Tool calls of chat completions: what reaches the engine, and what its text becomes, streamed and whole."""

import json
from typing import Any

import pytest
from api_under_test import EOS, TOKENIZER, api, byte_tokenizer, error_of, events, saying
from msgspec import structs

from headwater.generation.chat.formats import FormatFlags
from headwater.messages.base import unpack_ids
from headwater.messages.generation import Generate
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
PLACE = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
LOOK = {"type": "function", "function": {"name": "look", "description": "Look there.", "parameters": PLACE}}
BUY = {"type": "function", "function": {"name": "buy"}}
BODY = {"messages": USER, "tools": [LOOK, BUY]}
NAMED = {"type": "function", "function": {"name": "buy"}}
SAID = '<tool_call>\n{"name": "look", "arguments": {"at": "é\\n"}}\n</tool_call>'
SAID_TOO = '<tool_call>\n{"name": "buy", "arguments": {}}\n</tool_call>'
WITHOUT_TOOLS = "{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}<|assistant|>"
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + WITHOUT_TOOLS


@pytest.fixture(autouse=True)
def long_context(engine: ScriptedEngine) -> None:
    engine.ready = structs.replace(engine.ready, max_context=4096, num_pages=512)


def of_calls(message: dict[str, Any]) -> list[tuple[str, Any]]:
    assert all(call["type"] == "function" and call["id"].startswith("call_") for call in message["tool_calls"])
    functions = [call["function"] for call in message["tool_calls"]]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def joined(chunks: list[Any]) -> dict[str, Any]:
    """The message as OpenAI's SDK puts it together."""
    message: dict[str, Any] = {"content": "", "tool_calls": []}
    for delta in [chunk["choices"][0]["delta"] for chunk in chunks]:
        message["content"] += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append({"id": call["id"], "type": call["type"], "function": call["function"]})
                assert call["function"]["arguments"] == ""
            else:
                assert call.keys() == {"index", "function"}
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message


def prompt_text(engine: ScriptedEngine) -> str:
    return TOKENIZER.decode(unpack_ids(engine.of_type(Generate)[-1].prompt_ids).tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_calls_are_read_from_the_text(engine: ScriptedEngine, is_streamed: bool) -> None:
    engine.script.reply = saying(f"Well:\n{SAID}\n{SAID_TOO}")
    async with api(engine) as server:
        answer = await server.post(CHAT, BODY | {"stream": is_streamed})
    if is_streamed:
        chunks = events(answer)
        message, reason = joined(chunks), chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
    assert (message["content"], reason) == ("Well:", "tool_calls")
    assert of_calls(message) == [("look", {"at": "é\n"}), ("buy", {})]
    assert engine.of_type(Generate)[0].grammar is None, "auto forces nothing"


async def test_content_is_null_beside_calls_alone(engine: ScriptedEngine) -> None:
    engine.script.reply = saying(SAID)
    async with api(engine) as server:
        message = (await server.post(CHAT, BODY)).json()["choices"][0]["message"]
        assert message["content"] is None
        plain = (await server.post(CHAT, BODY | {"tool_choice": "none"})).json()["choices"][0]
    assert (plain["message"]["content"], plain["message"]["tool_calls"]) == (SAID, None), "none parses nothing"
    assert plain["finish_reason"] == "stop"


async def test_a_forced_call_is_a_grammar_of_the_tools_that_may_be_called(engine: ScriptedEngine) -> None:
    engine.script.reply = saying(SAID_TOO)
    async with api(engine) as server:
        for choice, has_look in (("required", True), (NAMED, False)):
            answer = (await server.post(CHAT, BODY | {"tool_choice": choice})).json()["choices"][0]
            assert (of_calls(answer["message"]), answer["finish_reason"]) == ([("buy", {})], "tool_calls")
            grammar = engine.of_type(Generate)[-1].grammar
            assert grammar is not None and grammar.begins_after == ()
            assert ("look" in grammar.text, "buy" in grammar.text) == (has_look, True)


async def test_one_call_at_most_without_parallel_calls(engine: ScriptedEngine) -> None:
    engine.script.reply = saying(f"{SAID}\n{SAID_TOO}")
    body = BODY | {"parallel_tool_calls": False}
    async with api(engine) as server:
        whole = (await server.post(CHAT, body)).json()["choices"][0]["message"]
        streamed = joined(events(await server.post(CHAT, body | {"stream": True})))
        assert of_calls(whole) == of_calls(streamed) == [("look", {"at": "é\n"})]
        grammars = []
        for is_parallel in (True, False):
            await server.post(CHAT, BODY | {"tool_choice": "required", "parallel_tool_calls": is_parallel})
            grammars.append(engine.of_type(Generate)[-1].grammar)
    assert grammars[0] != grammars[1]


async def test_logprobs_are_those_of_all_tokens_streamed_or_not(engine: ScriptedEngine) -> None:
    engine.script.reply = saying(f"a {SAID}")
    body = BODY | {"logprobs": True}
    async with api(engine) as server:
        whole = (await server.post(CHAT, body)).json()["choices"][0]
        chunks = events(await server.post(CHAT, body | {"stream": True}))
    streamed = [item for chunk in chunks for item in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert streamed == whole["logprobs"]["content"]
    text = b"".join(bytes(item["bytes"]) for item in streamed).decode()
    assert text == f"a {SAID}{EOS}"


async def test_a_call_that_the_limit_cuts_off_ends_with_length(engine: ScriptedEngine) -> None:
    engine.script.reply = saying(SAID)
    async with api(engine) as server:
        choice = (await server.post(CHAT, BODY | {"max_tokens": len(SAID) - 20})).json()["choices"][0]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_whole_tool_calls_are_complete_or_left_out(engine: ScriptedEngine, is_streamed: bool) -> None:
    long = SAID.replace("é", "é" * 40)
    async with api(engine) as server:
        for said, limit, calls, reason in (
            (long, 500, [("look", {"at": "é" * 40 + "\n"})], "tool_calls"),
            (long, len(long) - 30, [], "length"),
            (long.replace('"}}', '"]}'), 500, [], "stop"),
        ):
            engine.script.reply = saying(said)
            body = BODY | {"stream": is_streamed, "whole_tool_calls": True, "max_tokens": limit}
            answer = await server.post(CHAT, body)
            if is_streamed:
                *chunks, last = events(answer)
                message, finish_reason = joined(chunks), last["choices"][0]["finish_reason"]
                pieces = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
                assert len(pieces) == 2 * len(calls), "one delta has the name, one the arguments"
            else:
                message = answer.json()["choices"][0]["message"]
                finish_reason = answer.json()["choices"][0]["finish_reason"]
            assert of_calls({"tool_calls": message["tool_calls"] or []}) == calls
            assert finish_reason == reason
            assert message["content"] == (said if reason == "stop" else "" if is_streamed or not calls else None)


async def test_a_template_without_tools_gets_them_in_the_system_message(engine: ScriptedEngine) -> None:
    engine.script.reply = saying(SAID)
    for template, begins in ((WITHOUT_TOOLS, "<|user|>system: # Tools"), (WITHOUT_SYSTEM, "<|user|>user: # Tools")):
        tokenizer = byte_tokenizer(template)
        async with api(engine, tokenizer=tokenizer) as server:
            answer = (await server.post(CHAT, BODY | {"max_tokens": 100})).json()
            assert of_calls(answer["choices"][0]["message"]) == [("look", {"at": "é\n"})]
            assert prompt_text(engine).startswith(begins)
            assert json.dumps(LOOK) in prompt_text(engine)
            encoded = (await server.post("/tokenize", BODY)).json()
            assert encoded["tokens"] == unpack_ids(engine.of_type(Generate)[-1].prompt_ids).tolist()


async def test_an_error_names_the_place_in_the_messages_that_were_sent(engine: ScriptedEngine) -> None:
    async with api(engine, tokenizer=byte_tokenizer(WITHOUT_TOOLS)) as server:
        error = error_of(await server.post(CHAT, BODY | {"messages": [*USER, {"role": "user", "content": 5}]}))
        assert error["param"] == "messages[1].content"


async def test_without_the_description_or_the_parser_a_400_says_so(engine: ScriptedEngine) -> None:
    for flags, body, param in (
        (FormatFlags(tool_prompt="off"), BODY, "tools"),
        (FormatFlags(tool_call_parser="none"), BODY, "tools"),
        (FormatFlags(tool_call_parser="none"), BODY | {"tool_choice": "required"}, "tools"),
    ):
        async with api(engine, tokenizer=byte_tokenizer(WITHOUT_TOOLS), format_flags=flags) as server:
            assert error_of(await server.post(CHAT, body))["param"] == param
    async with api(engine, format_flags=FormatFlags(tool_call_parser="none")) as server:
        engine.script.reply = saying(SAID)
        assert (await server.post(CHAT, BODY)).json()["choices"][0]["message"]["content"] == SAID
        assert error_of(await server.post(CHAT, BODY | {"tool_choice": "required"}))["param"] == "tool_choice"


async def test_history_with_calls_and_results_is_accepted(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("done")
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "b"}'}}
    history = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "42"},
    ]
    async with api(engine, tokenizer=byte_tokenizer(WITHOUT_TOOLS)) as server:
        answer = await server.post(CHAT, {"messages": history, "tools": [BUY], "max_tokens": 9})
        assert answer.json()["choices"][0]["message"]["content"] == "done"
    assert '<|user|>assistant: <tool_call>\n{"name": "look", "arguments": {"at": "b"}}\n</tool_call>' in prompt_text(
        engine
    )
    assert "<|user|>user: <tool_response>\n42\n</tool_response>" in prompt_text(engine)


BAD = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


def with_parameters(parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters} | more}


async def test_a_schema_that_no_grammar_expresses_is_a_400_with_its_place(engine: ScriptedEngine) -> None:
    body = BODY | {"tools": [BUY, with_parameters(BAD)]}
    async with api(engine) as server:
        for more in ({"tool_choice": "required"}, {"tools": [BUY, with_parameters(BAD, strict=True)]}):
            error = error_of(await server.post(CHAT, body | more))
            assert error["param"] == "tools[1].function.parameters"
            assert "/properties/a" in error["message"] and "uniqueItems" in error["message"]
        for choice in ("auto", NAMED):
            answer = await server.post(CHAT, body | {"tool_choice": choice, "max_tokens": 1})
            assert answer.status_code == 200, "this schema is in no grammar"


async def test_a_strict_tool_makes_a_grammar_of_text_with_calls(engine: ScriptedEngine) -> None:
    engine.script.reply = saying(f"Well:\n{SAID}")
    tools = [with_parameters(PLACE, strict=True), with_parameters(BAD, name="g"), LOOK]
    async with api(engine) as server:
        answer = (await server.post(CHAT, BODY | {"tools": tools})).json()["choices"][0]
        assert of_calls(answer["message"]) == [("look", {"at": "é\n"})]
        assert answer["message"]["content"] == "Well:"
        await server.post(CHAT, BODY | {"tools": tools, "tool_choice": "none"})
    first, second = (message.grammar for message in engine.of_type(Generate))
    assert first is not None and "ANY_TEXT" in first.text and second is None


async def test_content_has_the_form_that_the_request_asks_for_beside_calls(engine: ScriptedEngine) -> None:
    engine.script.reply = saying(SAID)
    asked = BODY | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": PLACE}}}
    async with api(engine) as server:
        for choice, has_content in (("auto", True), ("required", False)):
            answer = (await server.post(CHAT, asked | {"tool_choice": choice})).json()["choices"][0]
            assert of_calls(answer["message"]) == [("look", {"at": "é\n"})]
            grammar = engine.of_type(Generate)[-1].grammar
            assert grammar is not None
            assert ("@answer" in grammar.text) == has_content
