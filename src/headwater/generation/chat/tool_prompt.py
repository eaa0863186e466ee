"""Tools for a chat template that has no place for them: described in the system message, called as Hermes JSON.

The words are those of Qwen2.5's template, which small models know best. Calls and results in the history get the same
form: calls in the assistant's content, results as the user's messages.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
_SYSTEM_ROLES = ("system", "developer")


def with_tools(messages: Sequence[Any], tools: Sequence[Message], *, has_system: bool = True) -> list[Any]:
    """The messages with the tools in the system message; without `has_system`, in the first message of the user.

    Messages that are no objects are left as they are, for the check of the template's messages to refuse.
    """
    described = _BEFORE + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools) + _AFTER
    shown = _all_shown(messages)
    roles = _SYSTEM_ROLES if has_system else ("user",)
    for index, message in enumerate(shown):
        if isinstance(message, Mapping) and message.get("role") in roles:
            order = (message.get("content"), described) if has_system else (described, message.get("content"))
            shown[index] = {**message, "content": _joined(*order)}
            return shown
        if has_system:
            break  # a system message is the first, or there is none
    return [{"role": roles[0], "content": described}, *shown]


def _all_shown(messages: Sequence[Any]) -> list[Any]:
    """The messages with calls in their content. Results that follow each other become one message of the user."""
    shown: list[Any] = []
    is_behind_result = False
    for message in messages:
        is_result = isinstance(message, Mapping) and message.get("role") == "tool"
        if not is_result:
            shown.append(_with_calls_said(message))
        else:
            response = _joined("<tool_response>", message.get("content"), "</tool_response>", gap="\n")
            before = shown.pop()["content"] if is_behind_result else None
            shown.append({"role": "user", "content": _joined(before, response, gap="\n")})
        is_behind_result = is_result
    return shown


def _with_calls_said(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls or not all(_is_call(call) for call in calls):
        return message
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return rest | {"content": _joined(message.get("content"), "\n".join(map(_call_text, calls)), gap="\n")}


def _is_call(call: Any) -> bool:
    return isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)


def _call_text(call: Message) -> str:
    function = call["function"]
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    name = json.dumps(function.get("name"), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {text or "{}"}}}\n</tool_call>'


def _joined(*contents: Any, gap: str = "\n\n") -> Any:
    """Contents as one: a string, or a list of parts if one of them is a list."""
    given = [content for content in contents if content]
    if all(isinstance(content, str) for content in given):
        return gap.join(given)
    parts: list[Any] = []
    for content in given:
        parts += content if isinstance(content, list) else [content]
    return parts
