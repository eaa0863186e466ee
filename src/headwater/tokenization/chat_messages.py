"""Convert OpenAI chat messages to the form that a chat template expects."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from headwater.tokenization.template_form import TemplateForm

_TEXT_PART_TYPES = ("text", "input_text", "output_text", "refusal")
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_SPEAKERS = ("user", "system", "developer")  # whose messages are nothing without content
_MAX_NESTING = 100
BROKEN_ARGUMENTS = "invalid_arguments"  # the key for arguments that are not a JSON object

Message = dict[str, Any]
Default = TemplateForm()


def normalize_messages(
    messages: Sequence[Mapping[str, Any]], *, developer_role: str = "system", form: TemplateForm = Default
) -> list[Message]:
    """Copies of the messages in a form that the template prints completely.

    - null content of an assistant or a tool becomes "", and lists of text parts become one string; beside tool calls,
      `form` determines the value of missing content
    - `arguments` become an object or JSON text; arguments that are not a JSON object (for example, cut off by a token
      limit) stay text, or get the key `invalid_arguments` if the template wants an object
    - other null fields and an empty `tool_calls` are dropped, because templates test whether fields are present
    - reasoning gets every name that templates read; the role `developer` becomes `developer_role`
    - fields that the template would omit go into the content: tool calls as JSON, results of tools as user messages

    ValueError that names the place for an invalid message: without a role, without content, or with a part that is not
    text.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError("messages: at least one message is needed")
    normalized: list[Message] = []
    for index, message in enumerate(messages):
        plain = _checked(message, where=f"messages[{index}]", developer_role=developer_role)
        normalized += _shaped(plain, form)
    return normalized


def _checked(message: Mapping[str, Any], *, where: str, developer_role: str) -> Message:
    """A copy with text as content ("" for none) and checked tool calls; `arguments` are unchanged."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: must be an object")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where}.role: must be a non-empty string")
    checked = {key: value for key, value in message.items() if value is not None}
    checked["role"] = developer_role if role == "developer" else role
    if role in _SPEAKERS and "content" not in checked:
        raise ValueError(f"{where}.content: is required; it must be a string or a list of text parts")
    checked["content"] = _text_of(message.get("content"), where=f"{where}.content")
    reasoning = next((checked[name] for name in _REASONING_NAMES if name in checked), None)
    if reasoning is not None:  # as in transformers
        checked = {"thinking": reasoning} | checked | {"reasoning_content": reasoning}
    if "tool_calls" in checked:
        checked["tool_calls"] = _checked_calls(checked["tool_calls"], where=f"{where}.tool_calls")
        if not checked["tool_calls"]:
            del checked["tool_calls"]
    return checked


def _text_of(content: Any, *, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}: must be a string, null or a list of text parts")
    return "\n".join(_text_of_part(part, where=f"{where}[{index}]") for index, part in enumerate(content))


def _text_of_part(part: Any, *, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{where}: must be an object with a type")
    part_type = part.get("type", "text")
    if part_type not in _TEXT_PART_TYPES:
        raise ValueError(f"{where}.type: {part_type!r} is not supported, this server takes text only")
    text = part.get("refusal" if part_type == "refusal" else "text")
    if not isinstance(text, str):
        raise ValueError(f"{where}.text: must be a string")
    return text


def _checked_calls(tool_calls: Any, *, where: str) -> list[Message]:
    if isinstance(tool_calls, str) or not isinstance(tool_calls, Sequence):
        raise ValueError(f"{where}: must be a list")
    return [_checked_call(call, where=f"{where}[{index}]") for index, call in enumerate(tool_calls)]


def _checked_call(call: Any, *, where: str) -> Message:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise ValueError(f"{where}.function: must be an object")
    function = dict(call["function"])
    if not isinstance(function.get("name"), str):
        raise ValueError(f"{where}.function.name: must be a string")
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, str | Mapping):
        raise ValueError(f"{where}.function.arguments: must be a string or an object")
    return {"type": "function"} | {**call, "function": function}


def _shaped(message: Message, form: TemplateForm) -> list[Message]:
    """The message in the template's form: two messages if it prints either content or calls, else one."""
    if message["role"] == "tool" and not form.shows_results:
        message = {"role": "user", "content": message["content"]}
    if "tool_calls" not in message:
        return [_with_content(message, message["content"], form)]
    if not form.shows_calls:
        calls = json.dumps([_named_arguments(call) for call in message.pop("tool_calls")], ensure_ascii=False)
        said = "\n".join(text for text in (message["content"], calls) if text)
        return [_with_content(message, said, form)]
    said = message["content"]
    calls = [_shaped_call(call, form) for call in message["tool_calls"]]
    if not said:
        return [_without_content(message | {"tool_calls": calls}, form)]
    if form.shows_calls_beside_content:
        return [_with_content(message | {"tool_calls": calls}, said, form)]
    words = _with_content({k: v for k, v in message.items() if k != "tool_calls"}, said, form)
    return [words, _without_content({"role": message["role"], "tool_calls": calls}, form)]


def _with_content(message: Message, text: str, form: TemplateForm) -> Message:
    return message | {"content": [{"type": "text", "text": text}] if form.has_content_parts else text}


def _without_content(message: Message, form: TemplateForm) -> Message:
    message = {name: value for name, value in message.items() if name != "content"}
    return message if form.empty_content == "absent" else message | {"content": _EMPTY[form.empty_content]}


_EMPTY: Mapping[str, Any] = {"null": None, "empty": ""}


def _shaped_call(call: Message, form: TemplateForm) -> Message:
    arguments = call["function"].get("arguments")
    return call | {"function": call["function"] | {"arguments": _shaped_arguments(arguments, form)}}


def _shaped_arguments(arguments: Any, form: TemplateForm) -> Any:
    given = {} if arguments is None or arguments == "" else arguments
    if form.arguments == "text":
        return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    found = _as_object(given)
    if found is None:
        return given if form.takes_argument_text else {BROKEN_ARGUMENTS: given}
    return found


def _named_arguments(call: Message) -> Message:
    function = call["function"]
    return {"name": function["name"], "arguments": _shaped_arguments(function.get("arguments"), Default)}


def _as_object(arguments: str | Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments as an object; None if the text is not a JSON object, or is nested too deeply to be read."""
    if isinstance(arguments, Mapping):
        return dict(arguments)
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):  # not JSON, or an integer with thousands of digits
        return None
    return found if isinstance(found, dict) and not _is_deep(found) else None


def _is_deep(value: Any) -> bool:
    """Whether JSON is nested too deeply for a template's `tojson`, which recurses."""
    level = [value]
    for _ in range(_MAX_NESTING):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = list(chain.from_iterable(inner))
        if not level:
            return False
    return True
