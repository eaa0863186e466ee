"""Finds the first match of regular expressions and stop strings in text that arrives in pieces."""

from headwater.tokenization.stop_program import Program

_Thread = tuple[int, int]  # a state that consumes, and where its match began


class StopRegexMatcher:
    """Passes text until a match is complete, and holds back text that may begin one.

    The match is the one whose last character comes first, and the longest of those. Of patterns with the same match the
    first one is reported. All patterns run side by side, one
    step a character (Pike's machine; Cox, "Regular expression matching: the virtual machine approach", 2009). So the
    result does not depend on the pieces of the text, and no pattern takes more than its number of states a character.

    With `include_stop`, the match is part of the text. The interface is that of `StopStringMatcher`.
    """

    def __init__(self, program: Program, *, include_stop: bool = False) -> None:
        self._program = program
        self._include_stop = include_stop
        self._threads: list[_Thread] = []  # those that began earlier come first
        self._seen: set[int] = set()  # states that earlier matches have reached at this position
        self._position = 0  # characters read
        self._is_line_start = True
        self._held = ""  # the newest characters read
        self._lead: set[str] = set()  # characters in the midst of a line with which nothing begins
        self.matched: str | None = None  # the pattern or string found; later text is ignored

    def feed(self, text: str) -> str:
        """The text that certainly precedes any match; empty after a match."""
        if self.matched is not None:
            return ""
        for number, char in enumerate(text, start=1):
            if not self._threads and not self._is_line_start and char in self._lead:
                self._position += 1
                self._seen.clear()
                continue
            if (began := self._step(char)) is not None:
                return self._end(self._held + text[:number], began)
        oldest = self._threads[0][1] if self._threads else self._position
        return self._release(self._held + text, num_held=self._position - oldest)

    def finish(self) -> str:
        """The text held back, at the end of the input."""
        held, self._held = self._held, ""
        self._threads = []
        return held

    def _step(self, char: str) -> int | None:
        """Read a character. If a match ends with it, returns where it began, and sets `matched`."""
        states = self._program.states
        was_idle, was_line_start = not self._threads, self._is_line_start
        self._add(self._program.starts, self._position, threads=self._threads, seen=self._seen)
        self._position += 1
        self._is_line_start = char == "\n"
        threads: list[_Thread] = []
        seen: set[int] = set()
        found: tuple[int, int] | None = None  # where the match begins, and the state that accepts it
        for number, began in self._threads:
            if found is not None and began > found[0]:
                break
            test, following, _, _ = states[number]
            if test is not None and test(char):
                accepting = self._add(following, began, threads=threads, seen=seen)
                if accepting is not None and (found is None or accepting < found[1]):
                    found = began, accepting
        if found is not None:
            self.matched = states[found[1]].accepts
            return found[0]
        self._threads, self._seen = threads, seen
        if was_idle and not threads and not was_line_start and char != "\n":
            self._lead.add(char)
        return None

    def _add(self, numbers: tuple[int, ...], began: int, *, threads: list[_Thread], seen: set[int]) -> int | None:
        """Add the consuming states that follow without a character; returns the first state that accepts there.

        States of patterns are numbered in the order of the patterns.
        """
        states, accepting = self._program.states, None
        stack = list(numbers)
        while stack:
            number = stack.pop()
            if number in seen:
                continue
            seen.add(number)
            test, following, accepts, place = states[number]
            if test is not None:
                threads.append((number, began))
            elif accepts is not None:
                accepting = number if accepting is None else min(number, accepting)
            elif not place or self._is_at(place):
                stack += following
        return accepting

    def _is_at(self, place: str) -> bool:
        return self._position == 0 if place == "text" else self._is_line_start

    def _end(self, text: str, began: int) -> str:
        self._held = ""
        return text if self._include_stop else text[: len(text) - (self._position - began)]

    def _release(self, text: str, *, num_held: int) -> str:
        border = len(text) - num_held
        self._held = text[border:]
        return text[:border]
