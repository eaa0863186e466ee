"""Anthropic's messages as those of a chat completion: nothing is lost, and what has no place is refused by name."""

from typing import Any

import pytest

from headwater.generation.errors import InvalidRequest
from headwater.http_api.anthropic.prompt import chat_messages


def of_user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def test_texts_and_systems() -> None:
    messages = [{"role": "user", "content": "a"}, of_user(text("b", cache_control={"type": "ephemeral"}), text("c"))]
    assert chat_messages(messages, [text("be"), text("kind")]) == [
        {"role": "system", "content": "be\nkind"},
        {"role": "user", "content": "a\nb\nc"},
    ]
    assert chat_messages([{"role": "user", "content": "a"}], None) == [{"role": "user", "content": "a"}]


def test_a_conversation_with_tools_and_thinking() -> None:
    thinking = {"type": "thinking", "thinking": "so", "signature": "x"}
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": "é"}}
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [text("4"), text("2")]},
        {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
        {"type": "tool_result", "tool_use_id": "t3"},
    ]
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": [thinking, {"type": "redacted_thinking", "data": "?"}, text("well"), call]},
        of_user(*results, text("and?")),
    ]
    assert chat_messages(messages, None) == [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "well",
            "reasoning_content": "so",
            "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "4\n2"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "and?"},
    ]


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("x-anthropic-billing-header: cc_version=2; cch=1;\nYou are", "You are"),
        ([text("x-anthropic-billing-header: cch=1;"), text("You are")], "You are"),
        ("You are\nx-anthropic-billing-header: said by the user", None),
        ("x-anthropic-billing-header: alone", ""),
    ],
)
def test_a_line_that_differs_in_each_request_is_no_prompt(system: Any, expected: str | None) -> None:
    """Otherwise no request of Claude Code would find the prefix of the last one."""
    (*found, _) = chat_messages([{"role": "user", "content": "a"}], system)
    wanted = system if expected is None else expected
    assert [message["content"] for message in found] == ([wanted] if wanted else [])


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (of_user({"type": "image", "source": {}}), "messages[0].content[0].type"),
        (of_user(text("a"), {"type": "document"}), "messages[0].content[1].type"),
        (of_user({"type": "tool_use", "id": "1", "name": "f", "input": {}}), "messages[0].content[0].type"),
        (of_user({"type": "tool_result"}), "messages[0].content[0].tool_use_id"),
        (of_user({"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}),
         "messages[0].content[0].content[0].type"),
        (of_user({"type": "tool_result", "tool_use_id": "1", "is_error": "no"}), "messages[0].content[0].is_error"),
        (of_user({"type": "text"}), "messages[0].content[0].text"),
        (of_user({"type": "text", "text": "\ud800"}), "messages[0].content[0].text"),
        (of_user({"type": ["text"]}), "messages[0].content[0].type"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 1}, "messages[0].content"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0]"),
        ({"role": "tool", "content": "a"}, "messages[0].role"),
        ({"content": "a"}, "messages[0].role"),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": "{}"}]},
         "messages[0].content[0].input"),
        ({"role": "assistant", "content": [{"type": "tool_result"}]}, "messages[0].content[0].type"),
    ],
)  # fmt: skip
def test_faults_are_named(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as found:
        chat_messages([message], None)
    assert found.value.param == param
    assert found.value.message.startswith(param)


def test_no_messages() -> None:
    with pytest.raises(InvalidRequest):
        chat_messages([], "be kind")
