"""Fields of Anthropic's API as those of a chat completion."""

from typing import Any

import pytest
from pydantic import ValidationError

from headwater.generation.errors import ApiError, from_validation
from headwater.http_api.anthropic.conversion import RENAMED, hides_thinking, request_fields
from headwater.http_api.anthropic.schemas import MessagesRequest
from headwater.http_api.openai.conversation import chat_request

BODY: dict[str, Any] = {"max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
TOOL = {"name": "f", "description": "does", "input_schema": SCHEMA}


def converted(*, thinks: bool = True, **more: Any) -> dict[str, Any]:
    return request_fields(MessagesRequest.model_validate(BODY | more), thinks=thinks)


def test_options_pass_by_name() -> None:
    fields = converted(temperature=0.5, top_k=4, top_p=0.9, stop_sequences=["x"], cache_salt="s", seed=3, stream=True)
    assert fields.items() >= {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "stop": ["x"], "cache_salt": "s"}.items()
    assert fields.items() >= {"seed": 3, "stream": True, "max_tokens": 5}.items()
    assert "min_p" not in fields, "what is left out may be recommended by the model's files"
    chat_request(fields, RENAMED)


def test_a_last_message_of_the_assistant_is_continued() -> None:
    messages = [*BODY["messages"], {"role": "assistant", "content": "so"}]
    assert converted(messages=messages)["continue_final_message"] is True
    assert "continue_final_message" not in converted()


def test_tools() -> None:
    (tool,) = converted(tools=[TOOL | {"strict": True, "type": "custom", "eager_input_streaming": True}])["tools"]
    function = {"name": "f", "description": "does", "parameters": SCHEMA, "strict": True}
    assert tool == {"type": "function", "function": function}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"tool_choice": "required", "parallel_tool_calls": False}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "tool", "name": "f"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
    ],
)
def test_choices_of_tools(choice: dict[str, Any], expected: dict[str, Any]) -> None:
    fields = converted(tools=[TOOL], tool_choice=choice)
    assert {name: fields[name] for name in ("tool_choice", "parallel_tool_calls") if name in fields} == expected


def test_thinking() -> None:
    enabled = converted(thinking={"type": "enabled", "budget_tokens": 7})
    assert enabled["chat_template_kwargs"] == {"enable_thinking": True}
    assert enabled["max_reasoning_tokens"] == 7
    none = converted(thinking={"type": "enabled", "budget_tokens": 7}, thinks=False)
    assert "max_reasoning_tokens" not in none, "a model that does not think keeps every budget"
    assert converted(thinking={"type": "disabled"})["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in converted(thinking={"type": "adaptive"})
    both = converted(thinking={"type": "disabled"}, chat_template_kwargs={"a": 1})
    assert both["chat_template_kwargs"] == {"enable_thinking": False, "a": 1}
    adaptive = {"type": "adaptive", "display": "omitted"}
    assert hides_thinking(MessagesRequest.model_validate(BODY | {"thinking": adaptive}))
    assert not hides_thinking(MessagesRequest.model_validate(BODY))


def test_a_schema_for_the_answer() -> None:
    fields = converted(output_config={"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"})
    schema = {"name": "answer", "schema": SCHEMA, "strict": True}
    assert fields["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert fields["reasoning_effort"] == "low"


def test_what_changes_nothing_is_accepted() -> None:
    """What Claude Code and the SDKs send beside the message."""
    keeps = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    converted(metadata={"user_id": "x"}, service_tier="auto", cache_control={"type": "ephemeral"}, speed="standard",
              context_management=keeps, inference_geo="eu", mcp_servers=[], container=None)  # fmt: skip


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOL | {"input_examples": [{}, {"a": 1}]}]}, "tools[0].input_examples"),
        ({"tools": [TOOL | {"allowed_callers": ["code_execution_20260120"]}]}, "tools[0].allowed_callers"),
        ({"tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"thinking": {"type": "adaptive", "display": "all"}}, "thinking.display"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0].type"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"speed": "fast"}, "speed"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_new_tokens": 3}, "max_new_tokens"),
        ({"temperatur": 0.5}, "temperatur"),
    ],
)
def test_what_is_not_honoured_is_named(more: dict[str, Any], param: str) -> None:
    try:
        converted(**more)
    except ValidationError as error:
        found = from_validation(error.errors())
    except ApiError as error:
        found = error
    else:
        pytest.fail("accepted")
    assert (found.status, found.param) == (400, param)
    assert str(found.message).startswith(param)


def test_max_tokens_is_required() -> None:
    with pytest.raises(ValidationError, match="max_tokens"):
        MessagesRequest.model_validate({"messages": BODY["messages"]})
