"""OpenAI messages in the form chat templates expect."""

import pytest

from headwater.tokenization.chat_messages import normalize_messages


def content_of(content) -> str:
    return normalize_messages([{"role": "user", "content": content}])[0]["content"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "one"}], "one"),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        ([{"type": "refusal", "refusal": "no"}], "no"),
        (["bare"], "bare"),
    ],
)
def test_content_becomes_one_string(content, text):
    """Templates of text models concatenate it; a list or None there is an error or the word `None`."""
    assert content_of(content) == text


def test_a_message_without_content_has_an_empty_one():
    assert normalize_messages([{"role": "assistant"}])[0]["content"] == ""


def test_tool_call_arguments_are_decoded_once():
    """Templates print them as JSON: left as JSON text they would be quoted twice."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
    (message,) = normalize_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": [2]}}
    assert call["function"]["arguments"] == '{"a": 1, "b": [2]}'  # the caller's own is untouched


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_no_arguments_are_an_empty_object(arguments):
    call = {"function": {"name": "now", "arguments": arguments}}
    (message,) = normalize_messages([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {}


def test_null_fields_are_dropped_and_others_kept():
    """`tool_calls is defined` is how templates ask; OpenAI's SDK sends nulls."""
    message = {"role": "tool", "content": "4", "tool_call_id": "c1"}
    assert normalize_messages([{**message, "tool_calls": None}]) == [message]


def test_reasoning_is_found_under_the_name_templates_read():
    message = {"role": "assistant", "content": "4", "reasoning": "2+2"}
    assert normalize_messages([message])[0]["reasoning_content"] == "2+2"
    message["reasoning_content"] = "older"
    assert normalize_messages([message])[0]["reasoning_content"] == "older"


def test_developer_is_the_system_role_of_templates_that_do_not_know_it():
    assert normalize_messages([{"role": "developer", "content": "x"}])[0]["role"] == "system"
    messages = [{"role": "developer", "content": "x"}]
    assert normalize_messages(messages, developer_role="developer")[0]["role"] == "developer"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], r"messages: at least one"),
        ("hello", r"messages: at least one"),
        (["hello"], r"messages\[0\]: must be an object"),
        ([{"content": "x"}], r"messages\[0\]\.role: must be a non-empty string"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content: must be a string, null or a list"),
        ([{"role": "user", "content": [7]}], r"messages\[0\]\.content\[0\]: must be an object"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]\.text"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "image_url"}]}],
            r"messages\[1\]\.content\[0\]\.type: 'image_url' is not supported",
        ),
        ([{"role": "assistant", "tool_calls": "x"}], r"messages\[0\]\.tool_calls: must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"messages\[0\]\.tool_calls\[0\]\.function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            r"messages\[0\]\.tool_calls\[0\]\.function\.arguments: is not valid JSON",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}],
            r"messages\[0\]\.tool_calls\[0\]\.function\.arguments: must be a JSON object",
        ),
    ],
)
def test_malformed_messages_are_refused_with_their_place(messages, error):
    with pytest.raises(ValueError, match=error):
        normalize_messages(messages)
