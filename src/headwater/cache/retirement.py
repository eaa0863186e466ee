"""What one retirement did, and what of it is still to come back."""

from dataclasses import dataclass, field

from headwater.cache.namespace import Scope, Tier


class RaisedScope:
    """A store's generation that is being raised. Until it acknowledges, the scope is neither read nor written.

    `place`: of the only store that owes it; None if any will do.
    """

    def __init__(self, scope: Scope, *, place: str | None = None) -> None:
        self.scope = scope
        self.place = place
        self.is_acknowledged = False


@dataclass(slots=True)
class Retirement:
    """The outcome of `PrefixCache.retire`, kept up to date while retired pages come back.

    `freed` and `retired` are pages by tier at the moment of the cut; `num_outstanding` falls as pins let go.
    """

    generation: int
    freed: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    retired: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    num_outstanding: int = 0  # retired pages still pinned
    raised: RaisedScope | None = None  # the generation of a store that is being raised for it
    num_leases: int = 0  # leases that hold pages in scope and may not publish them

    @property
    def is_acknowledged(self) -> bool:
        """Whether the store, if it was in scope, has made its pages unreachable."""
        return self.raised is None or self.raised.is_acknowledged

    @property
    def is_drained(self) -> bool:
        """Whether nothing computed before the retirement, in its scope, is held by anyone."""
        return self.num_outstanding == 0 and self.num_leases == 0
