"""Regular expressions as states that a matcher steps through, one character at a time."""

from functools import lru_cache
from typing import Any, NamedTuple

from headwater.tokenization.stop_syntax import (
    NEXT_IS_UNKNOWN,
    Branch,
    Character,
    End,
    Node,
    Repeat,
    Sequel,
    Start,
    Test,
    equals,
    read_pattern,
)

MAX_STATES = 200  # of one request: a character visits each at most twice, in 0.1 to 0.2 ms


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
            at = self._state(equals(char), (at,))
        return at

    def add_pattern(self, pattern: str) -> int:
        try:
            accept = self._state(None, (), pattern)
            return self._node(read_pattern(pattern), accept, is_last=True)
        except RecursionError:
            raise ValueError("is nested too deeply") from None

    def _state(self, test: Test | None, following: tuple[int, ...], accepts: str | None = None, at: str = "") -> int:
        if len(self.states) >= MAX_STATES:
            raise ValueError(f"brings the patterns and stop strings of a request to more than {MAX_STATES} states")
        self.states.append([test, following, accepts, at])
        return len(self.states) - 1

    def _node(self, node: Node, at: int, *, is_last: bool) -> int:
        """The state in which `node` begins, if `at` follows it. `is_last`: nothing but the end follows."""
        match node:
            case Character(test):
                return self._state(test, (at,))
            case Sequel(parts):
                for part in reversed(parts):
                    at = self._node(part, at, is_last=is_last and part is parts[-1])
                return at
            case Branch(options):
                return self._state(None, tuple(self._node(option, at, is_last=is_last) for option in options))
            case Repeat():
                return self._repeat(node, at)
            case Start(place):
                return self._state(None, (at,), None, place)
            case End():
                if not is_last:
                    raise ValueError(NEXT_IS_UNKNOWN)
                return at  # the text so far always ends here

    def _repeat(self, node: Repeat, at: int) -> int:
        part, low, high = node
        if high is None:
            loop = self._state(None, ())
            self.states[loop][1] = (self._node(part, loop, is_last=False), at)
            at = loop
        else:
            after = at
            for _ in range(high - low):
                at = self._state(None, (self._node(part, at, is_last=False), after))
        for _ in range(low):
            following, at = at, self._node(part, at, is_last=False)
            if at == following:  # the part is empty, and may be asked for a billion times
                break
        return at
