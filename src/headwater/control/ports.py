"""What the control plane needs from the rest of the engine. It imports neither scheduler nor cache."""

from dataclasses import dataclass
from typing import Protocol

from headwater.messages import PagesAndBytes, TokenIds


@dataclass(frozen=True, slots=True)
class FlushScope:
    """What a flush covers, in the words of the API. None means all."""

    tiers: tuple[str, ...]
    cache_salt: str | None = None
    extra_key: str | None = None
    prefix: TokenIds | None = None


class RetirementView(Protocol):
    """A retirement that was carried out (or previewed)."""

    @property
    def generation(self) -> int: ...

    @property
    def is_drained(self) -> bool:
        """Whether everything retired has come back."""
        ...

    def freed(self) -> dict[str, PagesAndBytes]:
        """By tier: pages that were free at once."""
        ...

    def retired(self) -> dict[str, PagesAndBytes]:
        """By tier: pages that were still pinned when they were cut."""
        ...


class CachePort(Protocol):
    """The cache, as an operator sees it."""

    @property
    def tiers(self) -> tuple[str, ...]:
        """Enabled tiers, `device` first."""
        ...

    def retire(self, scope: FlushScope) -> RetirementView: ...

    def preview(self, scope: FlushScope) -> RetirementView: ...


class RequestsPort(Protocol):
    """All requests at once."""

    def abort_all(self, message: str) -> int:
        """End every request; returns how many."""
        ...

    def retract_all(self) -> int:
        """Take the pages of every running request, which then waits; returns how many."""
        ...

    @property
    def num_running(self) -> int: ...


class StepPort(Protocol):
    """The step in flight, if any."""

    def is_step_in_flight(self) -> bool: ...


class BlockersPort(Protocol):
    """The only definition of idle: no blockers."""

    def __call__(self) -> dict[str, int]:
        """What is in flight, by name; empty when the engine is idle."""
        ...
