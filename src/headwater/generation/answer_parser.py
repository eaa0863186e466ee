"""From an answer's text, cut anywhere, to its reasoning, content and tool calls."""

from collections.abc import Sequence

from headwater.generation.reasoning import ReasoningFormat
from headwater.generation.tool_formats.parts import ParsedPart
from headwater.generation.tool_formats.reading.call_writer import CallWriter
from headwater.generation.tool_formats.reading.reader import Parse, Reader
from headwater.generation.tool_formats.tool_format import Tool, ToolFormat, Tools


class AnswerParser:
    """One answer, which may come in any pieces: the sum of the parts does not depend on them.

    Without `reasoning`, thinking is content; without `tool_format`, so are calls. `prompt`: the text that the model
    continues, or its end; it may have opened or closed the thinking. `holds_calls`: give a call out when it is
    complete, not as it comes; then a call that is broken or cut off never shows, however long it is. A `tool_format`
    that reads the whole answer (gpt-oss) is wanted even without tools, since it separates the content.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        reasoning: ReasoningFormat | None,
        *,
        tools: Sequence[Tool] = (),
        prompt: str = "",
        holds_calls: bool = False,
    ) -> None:
        if tool_format is None and reasoning is not None:
            tool_format = reasoning.whole
        self._tool_format = tool_format
        self._reasoning = reasoning
        self._reader = Reader()
        self._writer = CallWriter(
            holds_calls=holds_calls,
            trims=tool_format is not None and tool_format.trims,
            shows_reasoning=reasoning is None,
        )
        if tool_format is not None and tool_format.is_whole:
            self._reader.add(tool_format.opened_by(prompt))
        elif reasoning is not None:
            self._reader.add(reasoning.opened_by(prompt))
        self._steps = self._read({tool.name: tool for tool in tools})

    def feed(self, text: str) -> list[ParsedPart]:
        """The parts that this text makes certain."""
        self._reader.add(text)
        next(self._steps)
        return self._writer.take()

    def finish(self) -> list[ParsedPart]:
        """The parts that the answer's end makes certain. No text may follow."""
        self._reader.end()
        next(self._steps, None)
        self._writer.finish()
        return self._writer.take()

    def _read(self, tools: Tools) -> Parse[None]:
        if self._reasoning is not None and not (self._tool_format and self._tool_format.is_whole):
            other_ends = self._tool_format.thinking_ends if self._tool_format else ()
            yield from self._reasoning.read(self._reader, self._writer, other_ends)
        if self._tool_format is not None:
            yield from self._tool_format.read(self._reader, self._writer, tools)
        else:
            yield from self._reader.rest(self._writer.content)
