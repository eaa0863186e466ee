"""Regular expressions as states that a matcher steps through, one character at a time.

Python's own parser reads them, so the syntax is that of `re`. What would need more than states (backreferences,
look-around), or the next character (`\\b`), is refused, and so is a pattern that matches the empty text.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from re import _constants as op  # pyright: ignore[reportAttributeAccessIssue]  # as of 3.11 the module's only home
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any, NamedTuple

MAX_STATES = 200  # of one request: a character visits each at most twice, in 0.1 to 0.2 ms
_DIGITS = (op.CATEGORY_DIGIT, op.CATEGORY_NOT_DIGIT)
_SPACES = (op.CATEGORY_SPACE, op.CATEGORY_NOT_SPACE)
_COMPLEMENTS = (op.CATEGORY_NOT_DIGIT, op.CATEGORY_NOT_SPACE, op.CATEGORY_NOT_WORD)
Test = Callable[[str], bool]


class State(NamedTuple):
    """Consumes a character that passes `test`, or none if there is no test. `accepts`: a whole match ends here."""

    test: Test | None
    next: tuple[int, ...]
    accepts: str | None = None  # the pattern or string that matched
    at: str = ""  # "text" or "line": only at the start of one


class Program(NamedTuple):
    """The states of several patterns. A search begins in all `starts` at every character."""

    states: tuple[State, ...]
    starts: tuple[int, ...]


@lru_cache(maxsize=256)
def compile_stop(strings: tuple[str, ...], patterns: tuple[str, ...]) -> Program:
    """The program of literal strings and regular expressions. ValueError says why a pattern cannot be used."""
    builder, starts = _Builder(), []
    for pattern in patterns:
        try:
            starts.append(builder.add_pattern(pattern))
        except ValueError as error:
            raise ValueError(f"{pattern!r} {error}") from None
    starts += [builder.add_string(string) for string in strings]
    return Program(tuple(State(*state) for state in builder.states), tuple(starts))


class _Builder:
    """Thompson's construction, from the end of a pattern to its beginning (Thompson, 1968)."""

    def __init__(self) -> None:
        self.states: list[list[Any]] = []

    def add_string(self, string: str) -> int:
        at = self._state(None, (), string)
        for char in reversed(string):
            at = self._state(_equals(char), (at,))
        return at

    def add_pattern(self, pattern: str) -> int:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about syntax that may change its meaning one day
                parsed = _parser.parse(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        if parsed.getwidth()[0] == 0:
            raise ValueError("matches the empty text, so it would end every answer at once")
        try:
            accept = self._state(None, (), pattern)
            return self._sequence(list(parsed), accept, flags=parsed.state.flags, is_last=True)
        except RecursionError:
            raise ValueError("is nested too deeply") from None

    def _state(self, test: Test | None, following: tuple[int, ...], accepts: str | None = None, at: str = "") -> int:
        if len(self.states) >= MAX_STATES:
            raise ValueError(f"brings the patterns and stop strings of a request to more than {MAX_STATES} states")
        self.states.append([test, following, accepts, at])
        return len(self.states) - 1

    def _sequence(self, items: Sequence[tuple[Any, Any]], at: int, *, flags: int, is_last: bool) -> int:
        """The state in which `items` begin, if `at` follows them. `is_last`: nothing but the end follows."""
        for number, (code, argument) in reversed(list(enumerate(items))):
            ends = is_last and number == len(items) - 1
            at = self._item(code, argument, at, flags=flags, is_last=ends)
        return at

    def _item(self, code: Any, argument: Any, at: int, *, flags: int, is_last: bool) -> int:
        if code is op.BRANCH:
            branches = [self._sequence(list(part), at, flags=flags, is_last=is_last) for part in argument[1]]
            return self._state(None, tuple(branches))
        if code is op.SUBPATTERN:
            _, added, removed, part = argument
            return self._sequence(list(part), at, flags=(flags | added) & ~removed, is_last=is_last)
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            low, high, part = argument
            return self._repeat(part, at, low=low, high=high, flags=flags)
        if code is op.AT:
            return self._position(argument, at, flags=flags, is_last=is_last)
        return self._state(_test(code, argument, flags), (at,))

    def _repeat(self, part: Any, at: int, *, low: int, high: Any, flags: int) -> int:
        def once(following: int) -> int:
            return self._sequence(list(part), following, flags=flags, is_last=False)

        if high is op.MAXREPEAT:
            loop = self._state(None, ())
            self.states[loop][1] = (once(loop), at)
            at = loop
        else:
            after = at
            for _ in range(high - low):
                at = self._state(None, (once(at), after))
        for _ in range(low):
            at = once(at)
        return at

    def _position(self, kind: Any, at: int, *, flags: int, is_last: bool) -> int:
        if kind in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            is_of_line = kind is op.AT_BEGINNING and flags & re.MULTILINE
            return self._state(None, (at,), None, "line" if is_of_line else "text")
        if kind in (op.AT_END, op.AT_END_STRING) and is_last:  # the text so far always ends here
            return at
        raise ValueError("may have $ only at its end, and no \\b or \\B: the next character is not known")


def _test(code: Any, argument: Any, flags: int) -> Test:
    if code is op.LITERAL:
        test = _equals(chr(argument))
    elif code is op.NOT_LITERAL:
        return _negated(_folded(_equals(chr(argument)), flags))
    elif code is op.ANY:
        return _anything if flags & re.DOTALL else _not_a_line_end
    elif code is op.IN:
        is_negated = argument[0][0] is op.NEGATE
        test = _folded(_one_of([_member(code, of, flags) for code, of in argument[is_negated:]]), flags)
        return _negated(test) if is_negated else test
    else:
        raise ValueError(f"uses {str(code).lower()}, which cannot be searched for while a text arrives")
    return _folded(test, flags)


def _member(code: Any, argument: Any, flags: int) -> Test:
    if code is op.LITERAL:
        return _equals(chr(argument))
    if code is op.RANGE:
        low, high = argument
        return lambda char: low <= ord(char) <= high
    test = str.isdecimal if argument in _DIGITS else str.isspace if argument in _SPACES else _is_word
    if flags & re.ASCII:
        unlimited = test
        test = lambda char: char.isascii() and unlimited(char)  # noqa: E731
    return _negated(test) if argument in _COMPLEMENTS else test


def _equals(expected: str) -> Test:
    return lambda char: char == expected


def _one_of(tests: Sequence[Test]) -> Test:
    return lambda char: any(test(char) for test in tests)


def _negated(test: Test) -> Test:
    return lambda char: not test(char)


def _folded(test: Test, flags: int) -> Test:
    if not flags & re.IGNORECASE:
        return test
    return lambda char: any(test(form) for form in (char, char.lower(), char.upper()) if len(form) == 1)


def _anything(_: str) -> bool:
    return True


def _not_a_line_end(char: str) -> bool:
    return char != "\n"


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"
