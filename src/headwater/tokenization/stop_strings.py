"""Finds the first of several stop strings in text that arrives in pieces."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Node:
    """A state: the last `depth` characters are the longest suffix of the text that begins some stop string."""

    depth: int
    next: dict[str, int]
    fallback: int = 0  # node of the longest proper suffix that also begins a stop string
    match: str | None = None  # longest stop string that ends here


class StopStringMatcher:
    """Passes text until a stop string is complete, and holds back text that may begin one.

    The match is the stop string whose last character comes first, and the longest of those that end there. An
    Aho-Corasick automaton finds it (Aho and Corasick, 1975), one character at a time. So the result does not depend on
    the pieces of the text, and the cost does not depend on the number of stop strings.

    With `include_stop`, the stop string is part of the text. ValueError if a stop string is empty.
    """

    def __init__(self, stop: Sequence[str], *, include_stop: bool = False) -> None:
        if any(not string for string in stop):
            raise ValueError("stop: a stop string must not be empty")
        self._nodes = _build_automaton(stop)
        self._include_stop = include_stop
        self._state = 0
        self._held = ""
        self.matched: str | None = None  # the stop string found; later text is ignored

    def feed(self, text: str) -> str:
        """The text that certainly precedes any stop string; empty after a match."""
        if self.matched is not None:
            return ""
        nodes, state = self._nodes, self._state
        for position, char in enumerate(text):
            while state and char not in nodes[state].next:
                state = nodes[state].fallback
            state = nodes[state].next.get(char, 0)
            if nodes[state].match is not None:
                return self._end(self._held + text[: position + 1], nodes[state].match)
        self._state = state
        return self._hold_back(self._held + text, nodes[state].depth)

    def finish(self) -> str:
        """The text held back, at the end of the input."""
        held, self._held = self._held, ""
        self._state = 0
        return held

    def _end(self, text: str, matched: str | None) -> str:
        assert matched is not None
        self.matched = matched
        self._held = ""
        return text if self._include_stop else text[: len(text) - len(matched)]

    def _hold_back(self, text: str, num_chars: int) -> str:
        border = len(text) - num_chars
        self._held = text[border:]
        return text[:border]


def _build_automaton(stop: Sequence[str]) -> list[_Node]:
    """The automaton's nodes; node 0 is the root."""
    nodes = [_Node(depth=0, next={})]
    for string in stop:
        state = 0
        for char in string:
            if char not in nodes[state].next:
                nodes[state].next[char] = len(nodes)
                nodes.append(_Node(depth=nodes[state].depth + 1, next={}))
            state = nodes[state].next[char]
        nodes[state].match = string
    _link_fallbacks(nodes)
    return nodes


def _link_fallbacks(nodes: list[_Node]) -> None:
    """Set every node's fallback, breadth first, since a fallback is always shallower than its node."""
    queue = deque(nodes[0].next.values())
    while queue:
        node = nodes[queue.popleft()]
        for char, child_id in node.next.items():
            child = nodes[child_id]
            state = node.fallback
            while state and char not in nodes[state].next:
                state = nodes[state].fallback
            child.fallback = nodes[state].next.get(char, 0)
            if child.match is None:
                child.match = nodes[child.fallback].match
            queue.append(child_id)
