"""What one retirement did, and what of it is still to come back."""

from dataclasses import dataclass, field

from headwater.cache.namespace import Tier


@dataclass(slots=True)
class Retirement:
    """The outcome of `PrefixCache.retire`, kept up to date while retired pages come back.

    `freed` and `retired` are pages by tier at the moment of the cut; `num_outstanding` falls as pins let go.
    """

    generation: int
    freed: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    retired: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    num_outstanding: int = 0  # retired pages still pinned
    num_leases: int = 0  # leases that hold pages in scope and may not publish them

    @property
    def is_drained(self) -> bool:
        """Whether nothing computed before the retirement, in its scope, is held by anyone."""
        return self.num_outstanding == 0 and self.num_leases == 0
