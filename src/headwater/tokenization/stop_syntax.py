r"""Reads a regular expression in the syntax of Python's `re`, as far as states can express it.

`re` itself compiles every pattern first, so the reader below meets valid ones only. What would need more than states
(backreferences, look-around), or the next character (`\b`), is refused.
"""

import re
import string
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

Test = Callable[[str], bool]
NEXT_IS_UNKNOWN = r"may have $ only at its end, and no \b or \B: the next character is not known"
_ESCAPES = {"a": "\a", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_NUM_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_FLAGS = {"a": re.ASCII, "i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "u": re.UNICODE, "x": re.VERBOSE}
_REFUSED_GROUPS = {"=": "assert", "!": "assert", "<": "assert", "(": "groupref_exists", ">": "atomic_group"}
_REPEAT = re.compile(r"[*+?]|\{([0-9]*)(?:(,)([0-9]*))?\}")
_SPACE_OR_COMMENT = re.compile(r"(?:[ \t\n\r\v\f]|#[^\n]*(?:\n|\Z))*")


class Character(NamedTuple):
    """One character that passes the test."""

    test: Test


class Repeat(NamedTuple):
    """A part `low` to `high` times; None: without a limit."""

    part: "Node"
    low: int
    high: int | None


class Start(NamedTuple):
    """The start of the text, or of a line."""

    place: str  # "text" or "line"


class End(NamedTuple):
    """The end of the text, or of a line."""


class Sequel(NamedTuple):
    """One part after the other."""

    parts: "Sequence[Node]"


class Branch(NamedTuple):
    """One of several."""

    options: "Sequence[Node]"


Node = Character | Repeat | Start | End | Sequel | Branch


def read_pattern(pattern: str) -> Node:
    """The tree of a pattern. ValueError says why it cannot be used, a pattern that matches the empty text included."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax that may change its meaning one day
            compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    if compiled.match("") is not None:
        raise ValueError("matches the empty text, so it would end every answer at once")
    return _Reader(pattern).branch(compiled.flags)


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def branch(self, flags: int) -> Node:
        """Everything up to a `)` or the end."""
        options = [self._sequel(flags)]
        while self._take("|"):
            options.append(self._sequel(flags))
        return options[0] if len(options) == 1 else Branch(options)

    def _sequel(self, flags: int) -> Node:
        parts: list[Node] = []
        while True:
            if flags & re.VERBOSE:
                self._match(_SPACE_OR_COMMENT)
            if self._at == len(self._pattern) or self._pattern[self._at] in "|)":
                return parts[0] if len(parts) == 1 else Sequel(parts)
            if (repeat := self._repeat()) is not None:
                parts.append(Repeat(parts.pop(), *repeat))
            elif (part := self._part(flags)) is not None:
                parts.append(part)

    def _repeat(self) -> tuple[int, int | None] | None:
        """How often the part before is repeated. None: something else comes next, a `{` that stands for itself too."""
        found = self._match(_REPEAT, unless="{}")
        if found is None:
            return None
        if self._take("+"):
            raise ValueError("uses possessive_repeat, which cannot be searched for while a text arrives")
        self._take("?")  # a lazy repeat matches the same texts
        if found[0][0] != "{":
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[0]]
        low, comma, high = found.groups()
        return int(low or 0), int(high) if high else None if comma else int(low)

    def _part(self, flags: int) -> Node | None:
        """The next part; None for a comment or flags, which are none."""
        match char := self._next():
            case "(":
                return self._group(flags)
            case "[":
                return Character(self._set(flags))
            case ".":
                return Character(_anything if flags & re.DOTALL else _not_a_line_end)
            case "^":
                return Start("line" if flags & re.MULTILINE else "text")
            case "$":
                return End()
            case "\\":
                return self._escaped(flags)
        return Character(folded(equals(char), flags))

    def _escaped(self, flags: int) -> Node:
        letter = self._pattern[self._at]
        if letter in "bB":
            raise ValueError(NEXT_IS_UNKNOWN)
        if letter in "AZz":
            self._at += 1
            return Start("text") if letter == "A" else End()
        if letter in "123456789" and not self._match(re.compile("(?=[0-3][0-7]{2})")):
            raise ValueError("uses groupref, which cannot be searched for while a text arrives")
        found = self._class_or_character(flags)
        return Character(folded(equals(found) if isinstance(found, str) else found, flags))

    def _class_or_character(self, flags: int) -> Test | str:
        """What follows a backslash, inside a set or outside of it: a class, or one character."""
        letter = self._next()
        if letter in "dDsSwW":
            return _class_test(letter, flags)
        if letter in _NUM_HEX_DIGITS:
            return chr(int(self._next(_NUM_HEX_DIGITS[letter]), 16))
        if letter == "N":
            name = self._next(self._pattern.index("}", self._at) + 1 - self._at)
            return unicodedata.lookup(name[1:-1])
        if letter in string.octdigits:
            more = self._match(re.compile("[0-7]{0,2}"))
            return chr(int(letter + (more[0] if more else ""), 8))
        return _ESCAPES.get(letter, letter)

    def _set(self, flags: int) -> Test:
        is_negated = self._take("^")
        tests: list[Test] = []
        while not tests or self._pattern[self._at] != "]":
            low = self._member(flags)
            if not isinstance(low, str):
                tests.append(low)
            elif self._pattern[self._at] == "-" and self._pattern[self._at + 1] != "]":
                self._at += 1
                high = self._member(flags)
                assert isinstance(high, str), "re has checked the range"
                tests.append(_between(low, high))
            else:
                tests.append(equals(low))
        self._at += 1
        test = folded(_one_of(tests), flags)
        return _negated(test) if is_negated else test

    def _member(self, flags: int) -> Test | str:
        char = self._next()
        if char != "\\":
            return char
        return "\b" if self._take("b") else self._class_or_character(flags)

    def _group(self, flags: int) -> Node | None:
        if not self._take("?"):
            return self._closed(flags)
        if self._take("#"):
            self._at = self._pattern.index(")", self._at) + 1
            return None
        if self._take("P<"):
            self._at = self._pattern.index(">", self._at) + 1
            return self._closed(flags)
        if self._take("P="):
            raise ValueError("uses groupref, which cannot be searched for while a text arrives")
        if (kind := _REFUSED_GROUPS.get(self._pattern[self._at])) is not None:
            raise ValueError(f"uses {kind}, which cannot be searched for while a text arrives")
        return self._flagged(flags)

    def _flagged(self, flags: int) -> Node | None:
        """Flags of the whole pattern, which hold already, or those of this group."""
        is_added = True
        while (char := self._next()) not in ":)":
            if char == "-":
                is_added = False
            elif not is_added:
                flags &= ~_FLAGS[char]
            else:
                flags = flags & ~(re.ASCII | re.UNICODE) if char in "au" else flags
                flags |= _FLAGS[char]
        return None if char == ")" else self._closed(flags)

    def _closed(self, flags: int) -> Node:
        inner = self.branch(flags)
        self._at += 1
        return inner

    def _next(self, num: int = 1) -> str:
        self._at += num
        return self._pattern[self._at - num : self._at]

    def _take(self, text: str) -> bool:
        is_there = self._pattern.startswith(text, self._at)
        self._at += len(text) * is_there
        return is_there

    def _match(self, expected: re.Pattern[str], *, unless: str = "") -> re.Match[str] | None:
        """Take what matches here, unless it is just this."""
        found = expected.match(self._pattern, self._at)
        if found is None or (unless and found[0] == unless):
            return None
        self._at = found.end()
        return found


def equals(expected: str) -> Test:
    return lambda char: char == expected


def folded(test: Test, flags: int) -> Test:
    if not flags & re.IGNORECASE:
        return test
    return lambda char: any(test(form) for form in (char, char.lower(), char.upper()) if len(form) == 1)


def _class_test(letter: str, flags: int) -> Test:
    test: Test = {"d": str.isdecimal, "s": str.isspace, "w": _is_word}[letter.lower()]
    if flags & re.ASCII:
        unlimited = test
        test = lambda char: char.isascii() and unlimited(char)  # noqa: E731
    return _negated(test) if letter.isupper() else test


def _between(low: str, high: str) -> Test:
    return lambda char: low <= char <= high


def _one_of(tests: Sequence[Test]) -> Test:
    return lambda char: any(test(char) for test in tests)


def _negated(test: Test) -> Test:
    return lambda char: not test(char)


def _anything(_: str) -> bool:
    return True


def _not_a_line_end(char: str) -> bool:
    return char != "\n"


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"
