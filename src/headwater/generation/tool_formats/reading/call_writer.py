"""Collects what a parser finds, and decides what of it is certain."""

from collections.abc import Callable

from headwater.generation.tool_formats.parts import CallArguments, CallEnd, CallStart, Content, ParsedPart, Reasoning
from headwater.generation.tool_formats.reading.reader import CutOff, NotACall, Parse, Reader

MAX_HELD = 32  # characters of arguments, about ten tokens: most faults of a call show by then


class CallWriter:
    """The parts of one answer, in order.

    `holds_calls`: a call is given out when it is complete, so a broken or cut-off one never shows. Otherwise it is
    given out when it is complete or has more than MAX_HELD characters of arguments, and then as it comes. `trims`:
    whitespace between content and calls belongs to neither. `shows_reasoning`: reasoning is content.
    """

    def __init__(self, *, holds_calls: bool = False, trims: bool = True, shows_reasoning: bool = False) -> None:
        self._parts: list[ParsedPart] = []
        self._call: list[ParsedPart] = []  # held back
        self._space = ""  # whitespace behind content, held back while a call may follow
        self.holds_calls = holds_calls
        self._trims = trims
        self._shows_reasoning = shows_reasoning
        self._is_in_call = False
        self._is_given_out = False  # the beginning of the call that has not ended
        self._num_held = 0  # characters of its arguments
        self.is_after_call = False  # since when only whitespace has come

    def take(self) -> list[ParsedPart]:
        """The parts since the last time; neighbours of one kind are one part."""
        parts, self._parts = joined(self._parts), []
        return parts

    def content(self, text: str) -> None:
        if self._trims:
            if self.is_after_call:
                text = text.lstrip()
            kept = text.rstrip()
            text, space = kept, text[len(kept) :]
            if text:
                text, self._space = self._space + text, space
            else:
                self._space += space
        if text:
            self.is_after_call = False
            self._parts.append(Content(text))

    def reasoning(self, text: str) -> None:
        if self._shows_reasoning:
            self.content(text)
        elif text:
            self._parts.append(Reasoning(text))

    def start(self, name: str) -> None:
        assert not self._is_in_call
        self._is_in_call = True
        self._put(CallStart(name))

    def arguments(self, text: str) -> None:
        assert self._is_in_call
        if text:
            self._put(CallArguments(text))

    def end(self, *, is_certain: bool = True) -> None:
        """The call is complete. If it is not certain that it is one, `confirm` or `give_up` follows.

        Only `holds_calls` waits for certainty.
        """
        self._put(CallEnd())
        self._is_in_call = False
        if is_certain or not self.holds_calls:
            self.confirm()

    def confirm(self) -> None:
        self._leave_call()
        self._parts += self._call
        self._call = []

    def give_up(self, text: str) -> None:
        """What began as a call is none: `text` is all of it. A call that has been given out already ends here."""
        if self._is_given_out:
            self._parts.append(CallEnd())
            self._leave_call()
            return
        self._call = []
        self._is_in_call = False
        self._num_held = 0
        self.content(text)

    def cut_off(self) -> None:
        """The answer has ended in the midst of a call: nothing more comes out of it."""
        self._space = ""
        self._call = []

    def finish(self) -> None:
        """The answer has ended."""
        if self._space:
            self._parts.append(Content(self._space))
            self._space = ""

    def _put(self, part: ParsedPart) -> None:
        self._call.append(part)
        if isinstance(part, CallArguments):
            self._num_held += len(part.text)
        if self._is_given_out or (not self.holds_calls and self._num_held > MAX_HELD):
            self._is_given_out = True
            self._space = ""
            self._parts += self._call
            self._call = []

    def _leave_call(self) -> None:
        self._space = ""
        self._is_in_call = False
        self._is_given_out = False
        self._num_held = 0
        self.is_after_call = True


def attempt(reader: Reader, writer: CallWriter, call: Parse[None], *, opener: str = "") -> Parse[None]:
    """Read what may be a call, whose `opener` has just been taken. If it is none, its text is content."""
    reader.mark(before=opener)
    try:
        yield from call
    except NotACall:
        writer.give_up(reader.since_mark())
    except CutOff:
        reader.drop_rest()
        writer.cut_off()
    else:
        reader.unmark()


def section(reader: Reader, *, another: Callable[[], Parse[bool]], call: Callable[[], Parse[None]]) -> Parse[None]:
    """Read one `call` after the other while there is `another`. Those that are complete stay if a later one is none."""
    while (yield from another()):
        yield from call()
        reader.mark()


def joined(parts: list[ParsedPart]) -> list[ParsedPart]:
    """The same parts; neighbours of one kind are one part."""
    merged: list[ParsedPart] = []
    for part in parts:
        match (merged[-1] if merged else None), part:
            case (Content(before), Content(text)):
                merged[-1] = Content(before + text)
            case (Reasoning(before), Reasoning(text)):
                merged[-1] = Reasoning(before + text)
            case (CallArguments(before), CallArguments(text)):
                merged[-1] = CallArguments(before + text)
            case _:
                merged.append(part)
    return merged
