"""Fields of OpenAI's responses as those of a chat completion."""

from typing import Any

import pytest
from pydantic import ValidationError

from headwater.generation.errors import ApiError, from_validation
from headwater.http_api.openai.conversation import chat_request
from headwater.http_api.responses.conversion import RENAMED, request_fields
from headwater.http_api.responses.schemas import ResponsesRequest

MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object"}
TOOL = {"type": "function", "name": "f", "description": "does", "parameters": SCHEMA}


def converted(**more: Any) -> dict[str, Any]:
    return request_fields(ResponsesRequest.model_validate({"input": "hi"} | more), MESSAGES)


def test_options_pass_by_name() -> None:
    fields = converted(temperature=0.5, top_p=0.9, max_output_tokens=5, instructions="be", cache_salt="s", stream=True)
    assert fields.items() >= {"temperature": 0.5, "top_p": 0.9, "max_tokens": 5, "cache_salt": "s"}.items()
    assert fields["messages"] == [{"role": "system", "content": "be"}, *MESSAGES]
    assert fields["stream"] is True
    assert "logprobs" not in fields
    chat_request(fields, RENAMED)


def test_tools() -> None:
    fields = converted(tools=[TOOL | {"strict": True}], tool_choice={"type": "function", "name": "f"})
    function = {"name": "f", "description": "does", "parameters": SCHEMA, "strict": True}
    assert fields["tools"] == [{"type": "function", "function": function}]
    assert fields["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert converted(parallel_tool_calls=False)["parallel_tool_calls"] is False


def test_formats() -> None:
    assert "response_format" not in converted(text={"verbosity": "medium"})
    assert converted(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    schema = {"name": "n", "schema": SCHEMA, "strict": True}
    found = converted(text={"format": form})["response_format"]
    assert found == {"type": "json_schema", "json_schema": schema}


def test_reasoning_and_logprobs() -> None:
    fields = converted(reasoning={"effort": "low", "summary": "auto"}, include=["reasoning.encrypted_content"])
    assert fields["reasoning_effort"] == "low"
    fields = converted(include=["message.output_text.logprobs"], top_logprobs=2)
    assert (fields["logprobs"], fields["top_logprobs"]) == (True, 2)


def test_what_changes_nothing_is_accepted() -> None:
    """What the SDKs, agents and Codex send beside the input."""
    converted(background=False, store=False, truncation="disabled", service_tier="auto", prompt_cache_key="k",
              safety_identifier="x", user="u", metadata={"a": "b"}, stream_options={"include_obfuscation": False},
              max_tool_calls=3, conversation=None)  # fmt: skip


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"include": ["all"]}, "include[0]"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"messages": MESSAGES}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_not_honoured_is_named(more: dict[str, Any], param: str) -> None:
    try:
        chat_request(converted(**more), RENAMED)
    except ValidationError as error:
        found = from_validation(error.errors())
    except ApiError as error:
        found = error
    else:
        pytest.fail("accepted")
    assert (found.status, found.param) == (400, param)
    assert str(found.message).startswith(param)
