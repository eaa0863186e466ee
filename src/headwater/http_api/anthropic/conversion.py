"""From a body of Anthropic's API to the fields of a chat completion."""

from typing import Any

from headwater.generation.answer_fields import Json
from headwater.generation.errors import unsupported
from headwater.http_api.anthropic.prompt import chat_messages, is_continued
from headwater.http_api.anthropic.schemas import MessagesPrompt, MessagesRequest
from headwater.http_api.json_object import JsonObject, json_objects

RENAMED = (
    (".function.parameters", ".input_schema"),
    (".function.", "."),
    ("response_format.json_schema.schema", "output_config.format.schema"),
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
    ("reasoning_effort", "output_config.effort"),
    ("max_reasoning_tokens", "thinking.budget_tokens"),
    ("continue_final_message", "messages"),
    ("parallel_tool_calls", "tool_choice.disable_parallel_tool_use"),
)
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_KEEPS_ALL = "clear_thinking_20251015"


def request_fields(body: MessagesRequest, *, thinks: bool) -> Json:
    """The whole chat completion, for a model that thinks or not. InvalidRequest names what is not honoured."""
    fields = body.shared_fields() | prompt_fields(body)
    if not thinks:  # then it uses none of a budget
        fields.pop("max_reasoning_tokens", None)
    return fields | {"max_tokens": body.max_tokens, "stop": [*body.stop_sequences, *body.stop]}


def prompt_fields(body: MessagesPrompt) -> Json:
    """The fields that make the prompt, and those that limit what may be said."""
    fields: Json = {"messages": chat_messages(body.messages, body.system)}
    if is_continued(body.messages):
        fields["continue_final_message"] = True
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in json_objects(body.tools, "tools")]
    if body.tool_choice is not None:
        fields |= _choice(JsonObject(body.tool_choice, "tool_choice"))
    if body.output_config is not None:
        fields |= _output(JsonObject(body.output_config, "output_config"))
    if body.context_management is not None:
        _check_edits(JsonObject(body.context_management, "context_management"))
    return fields | _thinking(body)


def hides_thinking(body: MessagesPrompt) -> bool:
    """Whether the answer has no thinking blocks."""
    return body.thinking is not None and body.thinking.get("display") == "omitted"


def _tool(tool: JsonObject) -> Json:
    tool.kind(("custom",), default="custom", why="this server runs no tools itself")
    tool.refuse("defer_loading", "all tools are shown to the model")
    tool.refuse("input_examples", "write them into the description")
    if tool.get("allowed_callers") not in (None, ["direct"]):
        raise unsupported(tool.place("allowed_callers"), f"{tool.place('allowed_callers')}: must be ['direct']")
    function: Json = {"name": tool.text("name"), "parameters": tool.plain("input_schema")}
    if description := tool.text("description", default=""):
        function["description"] = description
    if tool.flag("strict"):
        function["strict"] = True
    return {"type": "function", "function": function}


def _choice(choice: JsonObject) -> Json:
    kind = choice.kind((*_CHOICES, "tool"), why="not a choice")
    if kind == "tool":
        fields: Json = {"tool_choice": {"type": "function", "function": {"name": choice.text("name")}}}
    else:
        fields = {"tool_choice": _CHOICES[kind]}
    if choice.flag("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return fields


def _thinking(body: MessagesPrompt) -> Json:
    given: Any = getattr(body, "chat_template_kwargs", None) or {}
    fields: Json = {"chat_template_kwargs": given} if given else {}
    if body.thinking is None:
        return fields
    thinking = JsonObject(body.thinking, "thinking")
    if thinking.get("display") not in (None, "summarized", "omitted"):
        raise thinking.fault("display", "must be summarized or omitted")
    kind = thinking.kind(("enabled", "adaptive", "disabled"), why="not a way to think")
    if kind == "adaptive":
        return fields
    if kind == "enabled":
        budget = thinking.number("budget_tokens")
        if budget < 1:
            raise thinking.fault("budget_tokens", f"must be 1 or more, got {budget}")
        fields["max_reasoning_tokens"] = budget
    return fields | {"chat_template_kwargs": {"enable_thinking": kind == "enabled"} | given}


def _output(config: JsonObject) -> Json:
    fields: Json = {}
    if config.get("effort") is not None:
        fields["reasoning_effort"] = config.text("effort")
    if config.get("format") is not None:
        form = JsonObject(config.get("format"), config.place("format"))
        form.kind(("json_schema",), why="not a format")
        schema = {"name": "answer", "schema": form.plain("schema"), "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


def _check_edits(management: JsonObject) -> None:
    """Edits cut the prompt when it grows long. Only those that cut nothing are accepted."""
    for edit in management.objects("edits"):
        edit.kind((_KEEPS_ALL,), why="nothing is cut from a prompt")
        if edit.get("keep") != "all":
            raise edit.fault("keep", "must be 'all': nothing is cut from a prompt")
