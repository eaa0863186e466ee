"""The weights that may answer at each time, from the trainer's answers and the callers' clock."""

import time


def checkpoint_of(label: str) -> str:
    """The checkpoint of a label `NAME-NUMBER`. Labels are unique, so an engine that missed an update is noticed."""
    return label.partition("-")[0]


class WeightsLog:
    """The labels in force. An update without an answer leaves both labels possible until the next success."""

    def __init__(self, label: str) -> None:
        self._spans: list[tuple[float, frozenset[str]]] = [(0.0, frozenset({label}))]

    @property
    def now(self) -> frozenset[str]:
        return self._spans[-1][1]

    def begin(self, target: str) -> frozenset[str]:
        """An update is about to be requested. Returns the labels in force, for `end`."""
        before = self.now
        self._set(before | {target})
        return before

    def end(self, *, before: frozenset[str], target: str, is_done: bool | None) -> None:
        """The update has ended: done, refused without a change, or (None) with an unknown outcome."""
        if is_done is not None:
            self._set(frozenset({target}) if is_done else before)

    def possible(self, since_s: float, until_s: float) -> frozenset[str]:
        """Labels that were in force at some time in between."""
        found: set[str] = set()
        for index, (start_s, labels) in enumerate(self._spans):
            end_s = self._spans[index + 1][0] if index + 1 < len(self._spans) else float("inf")
            if start_s <= until_s and end_s >= since_s:
                found |= labels
        return frozenset(found)

    def _set(self, labels: frozenset[str]) -> None:
        self._spans.append((time.monotonic(), labels))
