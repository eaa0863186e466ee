"""An answer's text as it comes. A parser is a generator over it that yields while it needs more text.

So a parser is plain sequential code, and its result cannot depend on how the text was cut: no decision is taken
before the text that decides it has come.
"""

import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Parse = Generator[None, None, T]  # yields: "more text, please"

WHITESPACE = re.compile(r"[ \t\r\n]+")


class CutOff(Exception):
    """The answer ended in the midst of a call."""


class NotACall(Exception):
    """The text that looked like a call is none."""


class Reader:
    """The text that has come and not been taken. A mark keeps the text that an unfinished call is made of."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # in _text
        self._num_dropped = 0  # characters before _text
        self._mark: int | None = None  # in _text
        self.has_ended = False

    @property
    def position(self) -> int:
        """Number of characters taken. Since the mark it may be set back."""
        return self._num_dropped + self._at

    @position.setter
    def position(self, position: int) -> None:
        self._at = position - self._num_dropped
        assert self._at >= (self._mark or 0)

    def add(self, text: str) -> None:
        num_dropped = self._at if self._mark is None else self._mark
        self._text = self._text[num_dropped:] + text
        self._at -= num_dropped
        self._num_dropped += num_dropped
        if self._mark is not None:
            self._mark = 0

    def end(self) -> None:
        self.has_ended = True

    def mark(self, *, before: str = "") -> None:
        """Keep the text from here on, or from `before`, which has just been taken."""
        self._mark = self._at - len(before)

    def since_mark(self) -> str:
        """The text taken since the mark, which this removes."""
        assert self._mark is not None
        text = self._text[self._mark : self._at]
        self._mark = None
        return text

    def unmark(self) -> None:
        self._mark = None

    def peek(self) -> Parse[str]:
        """The next character, which is not taken; "" at the end."""
        while self._at == len(self._text):
            if self.has_ended:
                return ""
            yield
        return self._text[self._at]

    def next(self) -> Parse[str]:
        """Take one character. Raises CutOff at the end."""
        character = yield from self.peek()
        if not character:
            raise CutOff
        self._at += 1
        return character

    def run(self, characters: re.Pattern[str]) -> str:
        """Take the characters that are there and match; more of them may come later. The pattern is `[...]+`."""
        found = characters.match(self._text, self._at)
        if not found:
            return ""
        self._at = found.end()
        return found[0]

    def all_of(self, characters: re.Pattern[str]) -> Parse[str]:
        """Take all characters that match, up to one that does not. The pattern is `[...]+`."""
        taken = ""
        while (yield from self.peek()) and (run := self.run(characters)):
            taken += run
        return taken

    def whitespace(self) -> Parse[str]:
        return (yield from self.all_of(WHITESPACE))

    def starts_with(self, *texts: str) -> Parse[str]:
        """The first of `texts` that comes next, which is not taken; "" if none does."""
        while True:
            rest = self._text[self._at : self._at + max(map(len, texts))]
            open_ones = [text for text in texts if rest.startswith(text) or text.startswith(rest)]
            if not open_ones:
                return ""
            if rest.startswith(open_ones[0]):
                return open_ones[0]
            if self.has_ended:
                return next((text for text in open_ones if rest.startswith(text)), "")
            yield

    def take(self, *texts: str) -> Parse[str]:
        """Take the first of `texts` that comes next; "" if none does."""
        found = yield from self.starts_with(*texts)
        self._at += len(found)
        return found

    def close(self, marker: str) -> Parse[None]:
        """Take the marker that closes a call, if it comes next; if the answer's end cuts it off, as far as it goes."""
        if not (yield from self.take(marker)) and self.has_ended and marker.startswith(self._text[self._at :]):
            self.drop_rest()

    def expect(self, *texts: str) -> Parse[str]:
        """Take the first of `texts` that comes next. Raises NotACall if none does, CutOff at the end."""
        found = yield from self.take(*texts)
        if found:
            return found
        rest = self._text[self._at :]
        raise CutOff if self.has_ended and any(text.startswith(rest) for text in texts) else NotACall

    def another(self, opener: str, *ends: str) -> Parse[bool]:
        """Take the `opener` that comes next, or one of the `ends`, with the whitespace before it. Is it the opener?

        Raises as `expect`.
        """
        yield from self.whitespace()
        return (yield from self.expect(opener, *ends)) == opener

    def rest(self, emit: Callable[[str], object]) -> Parse[None]:
        """Hand all text to `emit`, up to the answer's end."""
        while (yield from self.peek()):
            emit(self._text[self._at :])
            self._at = len(self._text)

    def drop_rest(self) -> None:
        self._at = len(self._text)

    def until(self, markers: Sequence[str], emit: Callable[[str], object]) -> Parse[str]:
        """Hand text to `emit` up to the first of `markers`, which is taken and returned; "" at the end.

        Of markers that begin at the same place, the longest counts.
        """
        while True:
            at, marker = self._find(markers)
            if at > self._at:
                emit(self._text[self._at : at])
                self._at = at
            if marker:
                self._at += len(marker)
                return marker
            if self.has_ended and self._at == len(self._text):
                return ""
            if not self.has_ended:
                yield

    def _find(self, markers: Sequence[str]) -> tuple[int, str]:
        """Where the first marker begins, or what may become one, or the end; and the marker, if it is certain."""
        firsts = _first_characters(tuple(markers))
        at = self._at
        while found := firsts.search(self._text, at):
            at = found.start()
            marker = max((each for each in markers if self._text.startswith(each, at)), key=len, default="")
            if not self.has_ended and self._may_become(markers, at, longer_than=len(marker)):
                return at, ""
            if marker:
                return at, marker
            at += 1
        return len(self._text), ""

    def _may_become(self, markers: Sequence[str], at: int, *, longer_than: int) -> bool:
        """Is all text from there on the beginning of a marker of more characters?"""
        num_there = max(len(self._text) - at, longer_than)
        return any(len(each) > num_there and each.startswith(self._text[at:]) for each in markers)


@lru_cache(256)
def _first_characters(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(sorted({re.escape(marker[0]) for marker in markers})))
