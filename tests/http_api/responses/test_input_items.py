"""Items of a response's input as messages of a chat: nothing is lost, and what has no place is refused by name."""

from typing import Any

import pytest

from headwater.generation.errors import InvalidRequest
from headwater.http_api.responses.input_items import chat_messages, listed_items


def messages(*items: dict[str, Any], stored: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return chat_messages(list(items), find_item=(stored or {}).get)


def called(id: str, arguments: str = "{}") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}


CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}


def test_texts() -> None:
    assert chat_messages("hi", find_item=lambda _: None) == [{"role": "user", "content": "hi"}]
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    developer = {"role": "developer", "content": "be kind"}
    assert messages(developer, {"type": "message", "role": "user", "content": parts}) == [
        developer,
        {"role": "user", "content": "a\nb"},
    ]


def test_what_the_assistant_thought_said_and_called_is_one_message() -> None:
    thought = {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "so"}]}
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look"}]}
    result = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "42"}]}
    found = messages({"role": "user", "content": "q"}, thought, said, CALL, CALL | {"call_id": "c2"}, result, said)
    assert found == [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "I look",
            "reasoning_content": "so",
            "tool_calls": [called("c1"), called("c2")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "assistant", "content": "I look"},
    ]


def test_a_second_answer_of_the_assistant_is_a_message_of_its_own() -> None:
    said = {"role": "assistant", "content": "a"}
    assert messages(said, said) == [said, said]
    assert messages(CALL, said) == [{"role": "assistant", "content": "", "tool_calls": [called("c1")]}, said]


def test_summaries_stand_for_reasoning_and_what_is_encrypted_is_left_out() -> None:
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]}
    encrypted = {"type": "reasoning", "summary": [], "encrypted_content": "x"}
    assert messages(encrypted, summary, CALL)[0]["reasoning_content"] == "so"


def test_a_reference_is_the_item_that_a_stored_response_has() -> None:
    stored = {"fc_1": CALL | {"id": "fc_1"}}
    for reference in ({"type": "item_reference", "id": "fc_1"}, {"id": "fc_1"}):
        assert messages(reference, stored=stored)[0]["tool_calls"] == [called("c1")]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "user", "content": [{"type": "input_image"}]}, "input[0].content[0].type"),
        ({"role": "user", "content": [{"type": "input_file"}]}, "input[0].content[0].type"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "tool", "content": "a"}, "input[0].role"),
        ({"type": "message", "content": "a"}, "input[0].role"),
        ({"type": "web_search_call"}, "input[0].type"),
        ({"type": "item_reference", "id": "gone"}, "input[0].id"),
        ({}, "input[0].id"),
        ({"type": "function_call", "call_id": "1", "name": "f"}, "input[0].arguments"),
        ({"type": "function_call_output", "output": "a"}, "input[0].call_id"),
        ({"type": "function_call_output", "call_id": "1"}, "input[0].output"),
        ({"type": "reasoning", "content": "so"}, "input[0].content"),
    ],
)
def test_faults_are_named(item: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as found:
        messages(item)
    assert found.value.param == param
    assert found.value.message.startswith(param)


def test_no_items() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        messages()


def test_listed_items_have_ids_and_parts() -> None:
    (message,) = listed_items("hi")
    assert message["content"] == [{"type": "input_text", "text": "hi"}]
    assert (message["role"], message["type"], message["id"][:4]) == ("user", "message", "msg_")
    said, call = listed_items([{"role": "assistant", "content": "a"}, CALL | {"id": "mine"}])
    assert said["content"] == [{"type": "output_text", "text": "a"}]
    assert call == CALL | {"id": "mine"}
