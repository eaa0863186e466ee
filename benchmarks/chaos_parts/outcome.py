"""The outcome of a run."""

import collections
from dataclasses import dataclass, field


@dataclass(slots=True)
class Outcome:
    """Counts of events, and the failures, which must stay empty."""

    requests: collections.Counter[str] = field(default_factory=collections.Counter)
    operations: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    latest_s: float = 0.0  # beyond an operation's timeout
    latest: str = ""

    def fail(self, kind: str, message: str) -> None:
        self.failures.append(f"{kind}: {message}"[:600])

    def answered(self, name: str, status: int, late_s: float) -> None:
        """An operation was answered `late_s` after its own deadline."""
        self.operations[f"{name} {status}"] += 1
        if late_s > self.latest_s:
            self.latest_s, self.latest = late_s, name

    def first(self, num_each: int) -> list[str]:
        """The first failures of each kind."""
        found: dict[str, list[str]] = {}
        for failure in self.failures:
            found.setdefault(failure.partition(":")[0], []).append(failure)
        return [failure for failures in found.values() for failure in failures[:num_each]]

    def kinds(self) -> dict[str, int]:
        """Failures by kind."""
        return dict(collections.Counter(failure.partition(":")[0] for failure in self.failures))
