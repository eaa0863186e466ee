"""The output of a response, item by item, and the events that report it."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from headwater.generation.answer_fields import Json
from headwater.generation.assistant_message import AssistantMessage, MessageDelta, ToolCallDelta
from headwater.http_api.responses.input_items import new_id
from headwater.http_api.sse import event

Logprobs = list[Json]
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}  # type of an item -> type of its one part


def whole_delta(message: AssistantMessage) -> MessageDelta:
    """A whole message as one delta."""
    calls = [ToolCallDelta(i, call.id, call.name, call.arguments) for i, call in enumerate(message.tool_calls)]
    return MessageDelta(message.content, message.reasoning, tuple(calls))


class Output:
    """Takes the deltas of a message and makes items and events of them, one item after the other."""

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        self.items: list[Json] = []
        self._numbers = numbers or count()
        self._pieces: list[str] = []  # text of the open item
        self._waiting: Logprobs = []  # of tokens whose text has not come
        self._logprobs: Logprobs = []  # of the open message
        self._open: Json | None = None

    def event(self, kind: str, **fields: Any) -> bytes:
        """An event with the next number."""
        return event({"type": kind, "sequence_number": next(self._numbers)} | fields, name=kind)

    def take(self, delta: MessageDelta, logprobs: Logprobs) -> list[bytes]:
        """The events of what is new. Log-probabilities go with the text; without text they wait for it."""
        self._waiting += logprobs
        events: list[bytes] = []
        if delta.reasoning:
            events += self._text("reasoning", delta.reasoning)
        if delta.content:
            events += self._text("message", delta.content)
        for call in delta.tool_calls:
            events += self._call(call)
        return events

    def end(self, status: str) -> list[bytes]:
        """The end of the last item, with its status. An output without items has one empty text."""
        begin = [] if self.items else self._begin("message")
        return begin + self._close(status)

    def _text(self, kind: str, text: str) -> list[bytes]:
        is_open = self._open is not None and self._open["type"] == kind
        events = [] if is_open else self._begin(kind)
        self._pieces.append(text)
        more = {"logprobs": self._take_waiting()} if kind == "message" else {}
        name = f"response.{_PARTS[kind]}.delta"
        return [*events, self.event(name, **self._place(), content_index=0, delta=text, **more)]

    def _call(self, call: ToolCallDelta) -> list[bytes]:
        events: list[bytes] = []
        if call.name is not None:
            facts = {"call_id": call.id, "name": call.name, "arguments": ""}
            events += self._begin("function_call", **facts)
        if call.arguments:
            self._pieces.append(call.arguments)
            name = "response.function_call_arguments.delta"
            events.append(self.event(name, **self._place(), delta=call.arguments))
        return events

    def _begin(self, kind: str, **facts: Any) -> list[bytes]:
        events = self._close("completed")
        item: Json = {"id": new_id(kind), "type": kind, "status": "in_progress"} | facts
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        self._open = item
        self.items.append(item)
        events.append(self.event("response.output_item.added", output_index=len(self.items) - 1, item=item))
        if kind in _PARTS:
            events.append(self._part_event("added", _part(kind, "")))
        return events

    def _close(self, status: str) -> list[bytes]:
        item, text = self._open, "".join(self._pieces)
        if item is None:
            return []
        events: list[bytes] = []
        kind = item["type"]
        if kind == "function_call":
            item["arguments"] = text
            name = "response.function_call_arguments.done"
            events.append(self.event(name, **self._place(), name=item["name"], arguments=text))
        else:
            events += self._part_done(kind, text)
        item["status"] = status
        events.append(self.event("response.output_item.done", output_index=len(self.items) - 1, item=item))
        self._open, self._pieces = None, []
        return events

    def _take_waiting(self) -> Logprobs:
        taken, self._waiting = self._waiting, []
        self._logprobs += taken
        return taken

    def _part_done(self, kind: str, text: str) -> list[bytes]:
        assert self._open is not None, "an item is closed"
        more: Json = {}
        if kind == "message":
            self._take_waiting()
            more = {"logprobs": self._logprobs}
        part = _part(kind, text) | more
        self._open["content"] = [part]
        self._logprobs = []
        name = f"response.{_PARTS[kind]}.done"
        done = self.event(name, **self._place(), content_index=0, text=text, **more)
        return [done, self._part_event("done", part)]

    def _part_event(self, what: str, part: Json) -> bytes:
        return self.event(f"response.content_part.{what}", **self._place(), content_index=0, part=part)

    def _place(self) -> Json:
        assert self._open is not None, "an item is open"
        return {"item_id": self._open["id"], "output_index": len(self.items) - 1}


def _part(kind: str, text: str) -> Json:
    part: Json = {"type": _PARTS[kind], "text": text}
    return part | {"annotations": [], "logprobs": []} if kind == "message" else part
