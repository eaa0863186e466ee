"""From Anthropic's messages to those of a chat completion."""

import re
from collections.abc import Iterable
from typing import Any

from headwater.generation.answer_fields import Json
from headwater.generation.errors import bad_request
from headwater.http_api.json_object import JsonObject, json_objects

# Claude Code begins its system prompt with a line that differs in each request, so no prefix would be found again.
_BILLING_LINE = re.compile(r"\Ax-anthropic-billing-header:[^\n]*(\n|\Z)")
_TEXT_ONLY = "this server takes text only"
_ERROR = "Error: "  # before the result of a tool that failed


def chat_messages(messages: list[dict[str, Any]], system: str | list[dict[str, Any]] | None) -> list[Json]:
    """The messages of a chat completion. InvalidRequest names the place of the first fault."""
    if not messages:
        raise bad_request("messages", "messages: at least one message is needed")
    converted = _system(system)
    for message in json_objects(messages, "messages"):
        role = message.text("role")
        if role not in ("user", "assistant", "system"):
            raise message.fault("role", f"must be user, assistant or system, got {role!r}")
        blocks = _blocks(message)
        if role == "assistant":
            converted.append(_of_assistant(blocks))
        else:
            converted.extend(_of_user(role, blocks))
    return _joined(converted)


def is_continued(messages: list[dict[str, Any]]) -> bool:
    """Whether the answer continues the last message."""
    return bool(messages) and messages[-1].get("role") == "assistant"


def _system(system: str | list[dict[str, Any]] | None) -> list[Json]:
    if system is None:
        return []
    blocks = [system] if isinstance(system, str) else _texts(json_objects(system, "system"))
    texts = [text for block in blocks if (text := _BILLING_LINE.sub("", block))]
    return [{"role": "system", "content": "\n".join(texts)}] if texts else []


def _blocks(message: JsonObject) -> list[JsonObject]:
    content = message.get("content")
    if isinstance(content, str):
        return [JsonObject({"type": "text", "text": content}, message.place("content"))]
    return json_objects(content, message.place("content"))


def _texts(blocks: Iterable[JsonObject]) -> list[str]:
    found = []
    for block in blocks:
        block.kind(("text",), why=_TEXT_ONLY)
        found.append(block.text("text"))
    return found


def _of_user(role: str, blocks: list[JsonObject]) -> list[Json]:
    """Texts and results of tools, in their order."""
    converted: list[Json] = []
    for block in blocks:
        if block.kind(("text", "tool_result"), why=_TEXT_ONLY) == "text":
            converted.append({"role": role, "content": block.text("text")})
        else:
            converted.append(_result(block))
    return converted


def _result(block: JsonObject) -> Json:
    content = block.get("content")
    text = content if isinstance(content, str) else "\n".join(_texts(block.objects("content")))
    if block.flag("is_error"):
        text = _ERROR + text
    return {"role": "tool", "tool_call_id": block.text("tool_use_id"), "content": text}


def _of_assistant(blocks: list[JsonObject]) -> Json:
    texts, thoughts, calls = [], [], []
    for block in blocks:
        match block.kind(("text", "tool_use", "thinking", "redacted_thinking"), why=_TEXT_ONLY):
            case "text":
                texts.append(block.text("text"))
            case "thinking":
                thoughts.append(block.text("thinking"))
            case "tool_use":
                function = {"name": block.text("name"), "arguments": block.json("input")}
                calls.append({"id": block.text("id"), "type": "function", "function": function})
    message: Json = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _joined(messages: list[Json]) -> list[Json]:
    """Texts of one role that follow each other become one message, as in Anthropic's API: templates want turns."""
    joined: list[Json] = []
    for message in messages:
        last = joined[-1] if joined else {}
        if message.keys() == {"role", "content"} == last.keys() and message["role"] == last["role"] != "tool":
            joined[-1] = {"role": message["role"], "content": f"{last['content']}\n{message['content']}"}
        else:
            joined.append(message)
    return joined
