"""From the input of a response to a chat's messages, and to the items that the server lists."""

import uuid
from collections.abc import Callable
from typing import Any

from headwater.generation.answer_fields import Json
from headwater.generation.errors import bad_request
from headwater.http_api.json_object import JsonObject, json_objects

Input = str | list[dict[str, Any]]
FindItem = Callable[[str], Json | None]  # an item of a stored response, by its id

_TEXT_ONLY = "this server takes text only"
_NO_TOOLS = "this server takes text and runs no tools itself"
_ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")
_ROLES = ("user", "assistant", "system", "developer")
_PARTS = ("input_text", "output_text", "text", "refusal")


def chat_messages(given: Input, *, find_item: FindItem) -> list[Json]:
    """The messages of a chat completion. InvalidRequest names the place of the first fault."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not given:
        raise bad_request("input", "input: must not be empty")
    turns = _Turns()
    for item in json_objects(given, "input"):
        _take(item, turns, find_item)
    return turns.messages


def assistant_message(content: str, reasoning: str, calls: list[tuple[str, str, str]]) -> Json:
    """An assistant's message; `calls` are ids, names and arguments."""
    message: Json = {"role": "assistant", "content": content}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id, name, arguments in calls
        ]
    return message


def listed_items(given: Input) -> list[Json]:
    """The items in the form in which the server lists them: each has an id, and messages have parts."""
    items: list[dict[str, Any]] = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return [_listed(item) for item in items]


class _Turns:
    """Messages, put together from items: what the assistant thought, said and called is one message."""

    def __init__(self) -> None:
        self.messages: list[Json] = []
        self._is_assistants = False  # the last message is the assistant's and may grow

    def add(self, message: Json) -> None:
        self.messages.append(message)
        self._is_assistants = False

    def think(self, text: str) -> None:
        message = self._assistant(has_spoken=True)
        message["reasoning_content"] = "\n".join([*filter(None, [message.get("reasoning_content")]), text])

    def say(self, text: str) -> None:
        self._assistant(has_spoken=True)["content"] = text

    def call(self, call: Json) -> None:
        self._assistant(has_spoken=False).setdefault("tool_calls", []).append(call)

    def _assistant(self, *, has_spoken: bool) -> Json:
        """The message to grow: a new one if the last is not the assistant's, or if it must not have spoken yet."""
        last = self.messages[-1] if self._is_assistants else None
        if last is None or (has_spoken and (last["content"] or "tool_calls" in last)):
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
            self._is_assistants = True
        return last


def _take(item: JsonObject, turns: _Turns, find_item: FindItem) -> None:
    match item.kind(_ITEMS, default="message" if item.get("role") else "item_reference", why=_NO_TOOLS):
        case "message":
            _take_message(item, turns)
        case "function_call":
            function = {"name": item.text("name"), "arguments": item.text("arguments")}
            turns.call({"id": item.text("call_id"), "type": "function", "function": function})
        case "function_call_output":
            turns.add({"role": "tool", "tool_call_id": item.text("call_id"), "content": _text(item, "output")})
        case "reasoning":
            if thought := _thought(item):
                turns.think(thought)
        case _:
            found = find_item(item.text("id"))
            if found is None:
                raise item.fault("id", f"no stored response has the item {item.text('id')!r}; send the item itself")
            _take(JsonObject(found, item.where), turns, find_item)


def _take_message(item: JsonObject, turns: _Turns) -> None:
    role = item.text("role")
    if role not in _ROLES:
        raise item.fault("role", f"must be one of {', '.join(_ROLES)}, got {role!r}")
    text = _text(item, "content")
    if role == "assistant":
        turns.say(text)
    else:
        turns.add({"role": role, "content": text})


def _text(item: JsonObject, name: str) -> str:
    """A string, or the texts of a list of parts."""
    if isinstance(item.get(name), str):
        return item.text(name)
    texts = []
    for part in json_objects(item.get(name), item.place(name)):
        kind = part.kind(_PARTS, why=_TEXT_ONLY)
        texts.append(part.text("refusal" if kind == "refusal" else "text"))
    return "\n".join(texts)


def _thought(item: JsonObject) -> str:
    """The text of a reasoning item. What another server has encrypted cannot be read, and is left out."""
    parts = item.objects("content") or item.objects("summary")
    return "\n".join(part.text("text") for part in parts)


def _listed(item: dict[str, Any]) -> Json:
    kind = item.get("type") or ("message" if item.get("role") else "item_reference")
    listed = {"id": new_id(kind)} | {name: value for name, value in item.items() if value is not None} | {"type": kind}
    if kind != "message":
        return listed
    is_assistants = listed["role"] == "assistant"
    if isinstance(listed["content"], str):
        text_type = "output_text" if is_assistants else "input_text"
        listed["content"] = [{"type": text_type, "text": listed["content"]}]
    return listed | {"status": "completed"}


def new_id(kind: str) -> str:
    """An id whose beginning names the kind of item."""
    prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}.get(kind, "it")
    return f"{prefix}_{uuid.uuid4().hex}"
