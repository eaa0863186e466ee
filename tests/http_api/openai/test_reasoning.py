"""Thinking in chat completions: separated from content and calls, counted, and limited."""

from typing import Any

import pytest
from api_under_test import api, byte_tokenizer, error_of, events
from msgspec import structs

from headwater.generation.chat.formats import FormatFlags
from headwater.messages.generation import Generate
from headwater.tokenization.tokenizer import Tokenizer
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"type": "function", "function": {"name": "buy"}}]
CALL = '<tool_call>\n{"name": "buy", "arguments": {}}\n</tool_call>'
WORDS = ("<think>", "</think>")
THINKS = "{{ messages[0]['content'] }}{{ tools[0]['function']['name'] if tools }}</think><|assistant|>"
OPENS = THINKS + "<think>\n{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}"
SAID = "<think>\nHm.\n</think>\n\nYes."


def thinker(template: str = THINKS) -> Tokenizer:
    """Its vocabulary has the markers as tokens that are not special, as Qwen3's."""
    return byte_tokenizer(template, words=WORDS)


def saying(tokenizer: Tokenizer, text: str):
    ids = [*tokenizer.encode(text), tokenizer.eos_token_ids[0]]
    return lambda _: iter(ids)


@pytest.fixture(autouse=True)
def larger_vocabulary(engine: ScriptedEngine) -> None:
    engine.ready = structs.replace(engine.ready, vocab_size=thinker().vocab_size)


def deltas(chunks: list[Any], name: str) -> list[str]:
    found = [chunk["choices"][0]["delta"].get(name) for chunk in chunks if chunk["choices"]]
    return [text for text in found if text]


@pytest.mark.parametrize(("template", "said"), [(THINKS, SAID), (OPENS, SAID.removeprefix("<think>\n"))])
async def test_thinking_is_separated_under_both_names(engine: ScriptedEngine, template: str, said: str) -> None:
    tokenizer = thinker(template)
    engine.script.reply = saying(tokenizer, said)
    async with api(engine, tokenizer=tokenizer) as server:
        message = (await server.post(CHAT, BODY)).json()["choices"][0]["message"]
        chunks = events(await server.post(CHAT, BODY | {"stream": True}))
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("Hm.", "Hm.", "Yes.")
    assert "".join(deltas(chunks, "reasoning_content")) == "".join(deltas(chunks, "reasoning")) == "Hm."
    assert "".join(deltas(chunks, "content")) == "Yes."


@pytest.mark.parametrize(("separates", "reasoning", "content"), [(True, "Hm.", "Yes."), (False, None, "Hm.Yes.")])
async def test_elements_are_read_without_tools(
    engine: ScriptedEngine, separates: bool, reasoning: str | None, content: str
) -> None:
    words = ("<|open|>", "<|close|>", "<|sep|>")
    tokenizer = byte_tokenizer("{% set argument = '' %}<|open|>think<|sep|>", words=words)  # Kimi K3's marks
    engine.ready = structs.replace(engine.ready, vocab_size=tokenizer.vocab_size)
    said = "Hm.<|close|>think<|sep|><|open|>response<|sep|>Yes.<|close|>response<|sep|>"
    engine.script.reply = saying(tokenizer, said)
    async with api(engine, tokenizer=tokenizer) as server:
        answer = await server.post(CHAT, BODY | {"separate_reasoning": separates})
    message = answer.json()["choices"][0]["message"]
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)


async def test_options_that_change_where_thinking_goes(engine: ScriptedEngine) -> None:
    tokenizer = thinker()
    engine.script.reply = saying(tokenizer, SAID)
    async with api(engine, tokenizer=tokenizer) as server:
        together = (await server.post(CHAT, BODY | {"separate_reasoning": False})).json()["choices"][0]["message"]
        assert (together["content"], "reasoning_content" in together) == (SAID, False)
        hidden = (await server.post(CHAT, BODY | {"include_reasoning": False})).json()["choices"][0]["message"]
        assert (hidden["content"], "reasoning" in hidden) == ("Yes.", False)
        chunks = events(await server.post(CHAT, BODY | {"include_reasoning": False, "stream": True}))
        assert (deltas(chunks, "reasoning"), "".join(deltas(chunks, "content"))) == ([], "Yes.")
        chunks = events(await server.post(CHAT, BODY | {"stream_reasoning": False, "stream": True}))
        assert deltas(chunks, "reasoning_content") == ["Hm."]
    async with api(engine, tokenizer=tokenizer, format_flags=FormatFlags(reasoning_parser="none")) as server:
        message = (await server.post(CHAT, BODY)).json()["choices"][0]["message"]
        assert message["content"] == SAID


async def test_thinking_that_the_template_closed_is_not_expected(engine: ScriptedEngine) -> None:
    tokenizer = thinker(OPENS)
    engine.script.reply = saying(tokenizer, "a </think> b")
    body = BODY | {"chat_template_kwargs": {"enable_thinking": False}, "tools": TOOLS, "tool_choice": "required"}
    async with api(engine, tokenizer=tokenizer) as server:
        message = (await server.post(CHAT, body)).json()["choices"][0]["message"]
    assert message["content"] == "a </think> b"
    grammar = engine.of_type(Generate)[0].grammar
    assert grammar is not None and grammar.begins_after == (), "the call comes at once"


async def test_a_message_that_is_continued_may_be_within_its_thinking(engine: ScriptedEngine) -> None:
    tokenizer = thinker("{# </think> #}{{ messages[-1]['content'] }}")
    engine.script.reply = saying(tokenizer, "Hm.</think>Yes.")
    async with api(engine, tokenizer=tokenizer) as server:
        for begun, reasoning, content in (("<think>a", "Hm.", "Yes."), ("<think>a</think>b", "", "Hm.</think>Yes.")):
            messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": begun}]
            answer = await server.post(CHAT, {"messages": messages, "continue_final_message": True})
            message = answer.json()["choices"][0]["message"]
            assert (message.get("reasoning", ""), message["content"]) == (reasoning, content)


async def test_tokens_of_thinking_are_counted(engine: ScriptedEngine) -> None:
    for template, said, count in (
        (THINKS, SAID, 7),
        (OPENS, "Hm.</think>Yes.", 4),
        (THINKS, "Yes.", 0),
        (OPENS, "Hm", 3),
    ):
        tokenizer = thinker(template)
        engine.script.reply = saying(tokenizer, said)
        async with api(engine, tokenizer=tokenizer) as server:
            usage = (await server.post(CHAT, BODY)).json()["usage"]
            assert usage["reasoning_tokens"] == count, said
            assert usage["completion_tokens_details"] == {"reasoning_tokens": count}
            body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
            assert events(await server.post(CHAT, body))[-1]["usage"] == usage


async def test_a_forced_call_begins_after_the_thinking(engine: ScriptedEngine) -> None:
    start_id, end_id = (thinker().token_id(word) for word in WORDS)
    body = BODY | {"tools": TOOLS, "tool_choice": "required"}
    for template, opener, said in (
        (OPENS, None, f"Hm.</think>\n{CALL}"),
        (THINKS, start_id, f"<think>Hm.</think>{CALL}"),
    ):
        tokenizer = thinker(template)
        engine.script.reply = saying(tokenizer, said)
        async with api(engine, tokenizer=tokenizer) as server:
            message = (await server.post(CHAT, body)).json()["choices"][0]["message"]
        assert message["reasoning"] == "Hm."
        assert [call["function"] for call in message["tool_calls"]] == [{"name": "buy", "arguments": "{}"}]
        grammar = engine.of_type(Generate)[-1].grammar
        assert grammar is not None
        assert (grammar.begins_after, grammar.opens_with) == ((end_id,), opener)


async def test_a_budget_of_thinking_reaches_the_engine(engine: ScriptedEngine) -> None:
    tokenizer = thinker()
    engine.script.reply = saying(tokenizer, SAID)
    async with api(engine, tokenizer=tokenizer) as server:
        for name in ("max_reasoning_tokens", "max_thinking_tokens", "thinking_token_budget"):
            await server.post(CHAT, BODY | {name: 5})
            grammar = engine.of_type(Generate)[-1].grammar
            assert grammar is not None and (grammar.text, grammar.begins_within) == ("", 5)
        await server.post(CHAT, BODY | {"max_reasoning_tokens": -1})
        assert engine.of_type(Generate)[-1].grammar is None
    async with api(engine) as server:  # a model that does not think
        error = error_of(await server.post(CHAT, BODY | {"max_reasoning_tokens": 5}))
        assert error["param"] == "max_reasoning_tokens"
        assert "--reasoning-parser" in error["message"]
