"""Monotonic counts of what moved between tiers, and of what did not, by cause."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class TransferCounters:
    """In pages, by kind (`offload`, `restore`, `persist`, `prefetch`) and by cause.

    `seconds` are those of the copies themselves: neither their wait for each other nor the loop's next look.
    """

    pages: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    dropped_pages: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, pages: int, seconds: float) -> None:
        self.pages[kind] = self.pages.get(kind, 0) + pages
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def drop(self, cause: str, pages: int) -> None:
        self.dropped_pages[cause] = self.dropped_pages.get(cause, 0) + pages

    def count(self, event: str, by: int = 1) -> None:
        self.events[event] = self.events.get(event, 0) + by
