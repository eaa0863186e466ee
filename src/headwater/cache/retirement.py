"""The outcome of one retirement, and the pages that it still waits for."""

from dataclasses import dataclass, field

from headwater.cache.namespace import Scope, Tier


class RaisedScope:
    """A generation that a store is to raise. Until the store acknowledges, the scope is neither read nor written.

    `place`: the only store whose acknowledgement counts; None: that of any store counts.
    """

    def __init__(self, scope: Scope, *, place: str | None = None) -> None:
        self.scope = scope
        self.place = place
        self.is_acknowledged = False


@dataclass(slots=True)
class Retirement:
    """The outcome of `PrefixCache.retire`, kept up to date while retired pages are freed.

    `freed` and `retired` are pages by tier at the moment of the cut. `num_outstanding` falls as pins are dropped.
    """

    generation: int
    freed: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    retired: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    num_outstanding: int = 0  # retired pages still pinned
    raised: RaisedScope | None = None  # the store's part of it
    num_leases: int = 0  # unreleased leases with pages in scope, which they may not publish

    @property
    def is_acknowledged(self) -> bool:
        """Whether the store, if it was in scope, has made the old pages unreachable."""
        return self.raised is None or self.raised.is_acknowledged

    @property
    def is_drained(self) -> bool:
        """Whether no lease or copy holds a page in scope that was computed before the retirement."""
        return self.num_outstanding == 0 and self.num_leases == 0
