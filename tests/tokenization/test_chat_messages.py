"""OpenAI messages in the form chat templates expect."""

import pytest

from headwater.tokenization.chat_messages import normalize_messages
from headwater.tokenization.template_form import TemplateForm


def content_of(content) -> str:
    return normalize_messages([{"role": "user", "content": content}])[0]["content"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
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


@pytest.mark.parametrize("role", ["assistant", "tool"])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_a_message_of_an_assistant_or_a_tool_may_have_no_content(role, content):
    """Clients send null beside tool calls, and for results that are nothing."""
    assert normalize_messages([{"role": role} | content])[0]["content"] == ""


def test_tool_call_arguments_are_decoded_once():
    """Templates print them as JSON: left as JSON text they would be quoted twice."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
    (message,) = normalize_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": [2]}}
    assert call["function"]["arguments"] == '{"a": 1, "b": [2]}'  # the caller's own is untouched


NO_OBJECTS = ['{"x": "cut of', "[]", "5", '"text"', "[" * 100_000, '{"a":' * 800 + "1" + "}" * 800]


def arguments_shown(arguments, form: TemplateForm):
    call = {"function": {"name": "f", "arguments": arguments}}
    (message,) = normalize_messages([{"role": "assistant", "tool_calls": [call]}], form=form)
    return message["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize("arguments", NO_OBJECTS)
def test_arguments_that_are_no_json_object_are_shown_and_never_a_lasting_400(arguments):
    """A call that a token limit cut stays in the history of its conversation for good."""
    assert arguments_shown(arguments, TemplateForm(arguments="object")) == {"invalid_arguments": arguments}
    assert arguments_shown(arguments, TemplateForm(arguments="object", takes_argument_text=True)) == arguments
    assert arguments_shown(arguments, TemplateForm(arguments="text")) == arguments


def test_arguments_are_text_for_a_template_that_concatenates_them():
    form = TemplateForm(arguments="text")
    assert arguments_shown('{"a":  1}', form) == '{"a":  1}'
    assert arguments_shown({"a": "ü"}, form) == '{"a": "ü"}'
    assert [arguments_shown(nothing, form) for nothing in (None, "", {}, "{}")] == ["{}"] * 4


def test_no_tool_calls_are_no_tool_calls():
    """OpenAI's own SDK sends `tool_calls: []` back; templates ask whether the field is there."""
    (message,) = normalize_messages([{"role": "assistant", "content": "a", "tool_calls": []}])
    assert message == {"role": "assistant", "content": "a"}


CALLED = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": '{"a": 1}'}}],
}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_no_content_beside_a_call_is_what_the_template_tests_for(content):
    for form, expected in (("null", {"content": None}), ("empty", {"content": ""}), ("absent", {})):
        (message,) = normalize_messages([CALLED | content], form=TemplateForm(empty_content=form))
        assert {name: value for name, value in message.items() if name == "content"} == expected


def test_content_and_calls_are_two_messages_where_a_template_shows_either():
    form = TemplateForm(empty_content="null", shows_calls_beside_content=False)
    words, call = normalize_messages([CALLED | {"content": "let me see"}], form=form)
    assert words == {"role": "assistant", "content": "let me see"}
    assert (call["content"], len(call["tool_calls"])) == (None, 1)


def test_what_a_template_would_leave_out_is_said_in_content():
    form = TemplateForm(shows_calls=False, shows_results=False)
    result = {"role": "tool", "tool_call_id": "c1", "content": "5 C"}
    said, heard = normalize_messages([CALLED | {"content": "let me see"}, result], form=form)
    assert said == {"role": "assistant", "content": 'let me see\n[{"name": "f", "arguments": {"a": 1}}]'}
    assert heard == {"role": "user", "content": "5 C"}


def test_contents_are_lists_of_parts_for_a_template_that_prints_nothing_else():
    form = TemplateForm(has_content_parts=True)
    (message,) = normalize_messages([{"role": "user", "content": "x"}], form=form)
    assert message["content"] == [{"type": "text", "text": "x"}]


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
    assert normalize_messages([message])[0]["thinking"] == "2+2"
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
        ([{"role": "user"}], r"messages\[0\]\.content: is required"),
        ([{"role": "system", "content": None}, {"role": "user", "content": "x"}], r"messages\[0\]\.content: is"),
        ([{"role": "user", "content": "x"}, {"role": "developer"}], r"messages\[1\]\.content: is required"),
        ([{"role": "user", "content": [7]}], r"messages\[0\]\.content\[0\]: must be an object"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]\.text"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "image_url"}]}],
            r"messages\[1\]\.content\[0\]\.type: 'image_url' is not supported",
        ),
        ([{"role": "assistant", "tool_calls": "x"}], r"messages\[0\]\.tool_calls: must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"messages\[0\]\.tool_calls\[0\]\.function"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}],
            r"messages\[0\]\.tool_calls\[0\]\.function\.arguments: must be a string or an object",
        ),
    ],
)
def test_malformed_messages_are_refused_with_their_place(messages, error):
    with pytest.raises(ValueError, match=error):
        normalize_messages(messages)
