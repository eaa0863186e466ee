"""Bring OpenAI chat messages into the form that chat templates of text models expect."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headwater.tokenization.json_nesting import MAX_NESTING, is_too_deep

_TEXT_PART_TYPES = ("text", "input_text", "output_text", "refusal")


def normalize_messages(
    messages: Sequence[Mapping[str, Any]], *, developer_role: str = "system"
) -> list[dict[str, Any]]:
    """Copies of the messages with plain string content and decoded tool arguments.

    Templates concatenate `content`, so null becomes "" and a list of text parts is joined by newlines. They
    print `arguments` as JSON themselves, so its JSON text is decoded to a dict. Other null fields are
    dropped, for templates test fields by their presence. The role `developer` becomes `developer_role`.

    ValueError, naming the place, for what is no such message: no role, a part that is not text, arguments
    that are not a JSON object.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError("messages: at least one message is needed")
    return [
        _normalize_message(message, where=f"messages[{index}]", developer_role=developer_role)
        for index, message in enumerate(messages)
    ]


def _normalize_message(message: Mapping[str, Any], *, where: str, developer_role: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: must be an object")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where}.role: must be a non-empty string")
    normalized = {key: value for key, value in message.items() if value is not None}
    normalized["role"] = developer_role if role == "developer" else role
    normalized["content"] = _text_of(message.get("content"), where=f"{where}.content")
    if "reasoning" in normalized:  # the newer name of the field; templates read the older one
        normalized.setdefault("reasoning_content", normalized["reasoning"])
    if "tool_calls" in normalized:
        tool_calls = _normalize_tool_calls(normalized["tool_calls"], where=f"{where}.tool_calls")
        normalized["tool_calls"] = tool_calls
    return normalized


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


def _normalize_tool_calls(tool_calls: Any, *, where: str) -> list[dict[str, Any]]:
    if isinstance(tool_calls, str) or not isinstance(tool_calls, Sequence):
        raise ValueError(f"{where}: must be a list")
    return [_normalize_tool_call(call, where=f"{where}[{index}]") for index, call in enumerate(tool_calls)]


def _normalize_tool_call(call: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise ValueError(f"{where}.function: must be an object")
    function = dict(call["function"])
    if not isinstance(function.get("name"), str):
        raise ValueError(f"{where}.function.name: must be a string")
    arguments = function.get("arguments")
    function["arguments"] = _decode_arguments(arguments, where=f"{where}.function.arguments")
    return {**call, "function": function}


def _decode_arguments(arguments: Any, *, where: str) -> dict[str, Any]:
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        if is_too_deep(arguments.encode("utf-8", "surrogatepass")):
            raise ValueError(f"{where}: must not be nested deeper than {MAX_NESTING} levels")
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:  # no JSON, or an integer of thousands of digits
            raise ValueError(f"{where}: is not valid JSON ({error})") from error
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: must be a JSON object")
    return dict(arguments)
