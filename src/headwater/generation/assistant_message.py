"""The assistant's message in an answer: content, reasoning and tool calls, read from text that may be cut anywhere."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from headwater.generation.answer_parser import AnswerParser
from headwater.generation.tool_formats.parts import CallArguments, CallEnd, CallStart, Content, ParsedPart, Reasoning


class ToolCallDelta(NamedTuple):
    """What is new of one tool call. The first delta of a call has its id and name, the next ones have arguments."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class MessageDelta(NamedTuple):
    """What one piece of text added to the message."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(slots=True)
class ToolCall:
    """A call that the model wants; `arguments` is JSON text, incomplete while the call is written."""

    id: str
    name: str
    pieces: list[str] = field(default_factory=list)  # of the arguments

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)


def new_call_id() -> str:
    """An id in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


class AssistantMessage:
    """One answer, fed with the text of its chunks. The sum of the deltas is the message, however the text was cut.

    Without a parser, all text is content. Calls beyond `max_calls` are dropped, and so is the content behind the last
    call that is kept. Without `streams_reasoning`, the reasoning comes in one delta, when it has ended.
    """

    def __init__(
        self,
        parser: AnswerParser | None = None,
        *,
        max_calls: int | None = None,
        new_id: Callable[[], str] = new_call_id,
        streams_reasoning: bool = True,
    ) -> None:
        self.tool_calls: list[ToolCall] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._parser = parser
        self._max_calls = max_calls
        self._new_id = new_id
        self._streams_reasoning = streams_reasoning
        self._num_streamed = 0  # pieces of reasoning
        self._is_full = False  # the last call that is kept has ended

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    def feed(self, text: str, *, is_last: bool = False) -> MessageDelta:
        """What `text` adds. `is_last` ends the message; text held back until then comes with this delta."""
        if self._parser is None:
            if text:
                self._content.append(text)
            return MessageDelta(content=text)
        parts = self._parser.feed(text) if text else []
        if is_last:
            parts = [*parts, *self._parser.finish()]
        if not parts and not is_last:
            return MessageDelta()
        num_contents = len(self._content)
        calls = tuple(delta for part in parts if (delta := self._take(part)) is not None)
        content = "".join(self._content[num_contents:])
        may_stream = self._streams_reasoning or is_last or not isinstance(parts[-1], Reasoning)
        return MessageDelta(content, self._take_reasoning() if may_stream else "", calls)

    def _take(self, part: ParsedPart) -> ToolCallDelta | None:
        """Add a part to the message; the delta if it belongs to a call."""
        if self._is_full:
            return None
        index = len(self.tool_calls) - 1
        match part:
            case Content(text):
                self._content.append(text)
            case Reasoning(text):
                self._reasoning.append(text)
            case CallStart(name):
                self.tool_calls.append(ToolCall(self._new_id(), name))
                return ToolCallDelta(index + 1, self.tool_calls[-1].id, name, "")
            case CallArguments(text):
                self.tool_calls[index].pieces.append(text)
                return ToolCallDelta(index, None, None, text)
            case CallEnd():
                self._is_full = len(self.tool_calls) == self._max_calls
        return None

    def _take_reasoning(self) -> str:
        pieces = self._reasoning[self._num_streamed :]
        self._num_streamed = len(self._reasoning)
        return "".join(pieces)
