"""The assistant's message in an answer: content, reasoning and tool calls, read from text that may be cut anywhere."""

from dataclasses import dataclass
from typing import NamedTuple


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
    arguments: str = ""


class AssistantMessage:
    """One answer, fed with the text of its chunks. The sum of the deltas is the message, however the text was cut."""

    def __init__(self) -> None:
        self.reasoning = ""
        self.tool_calls: list[ToolCall] = []
        self._content: list[str] = []

    @property
    def content(self) -> str:
        return "".join(self._content)

    def feed(self, text: str, *, is_last: bool = False) -> MessageDelta:
        """What `text` adds. `is_last` ends the message; what was held back comes with this delta."""
        del is_last  # nothing is held back yet
        if text:
            self._content.append(text)
        return MessageDelta(content=text)
