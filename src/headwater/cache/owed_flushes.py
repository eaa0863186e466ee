"""Flushes of storage that no store has acknowledged, and who has to carry them out."""

from headwater.cache.namespace import Scope
from headwater.cache.retirement import RaisedScope

_Counter = tuple[str | None, str | None]  # of a store: salt and key of the scope


class OwedFlushes:
    """What stores that were detached still owe, for as long as this engine lives.

    Whoever is attached next carries out what nobody has, so that the flush comes to its end. The store that it was
    meant for owes it all the same: it may come back, with the old pages.
    """

    def __init__(self) -> None:
        self._next: list[RaisedScope] = []
        self._by_place: dict[str, dict[_Counter, Scope]] = {}

    def add(self, raised: RaisedScope) -> None:
        """A flush while no store is attached."""
        self._next.append(raised)

    def left_by(self, place: str, unacknowledged: list[RaisedScope]) -> None:
        """The store at `place` is detached before it acknowledged these."""
        self._next += [raised for raised in unacknowledged if raised.place is None]
        owed = self._by_place.setdefault(place, {})
        for raised in unacknowledged:
            owed[raised.scope.cache_salt, raised.scope.extra_key] = raised.scope
        if not owed:
            del self._by_place[place]

    def take(self, place: str) -> list[RaisedScope]:
        """What the store at `place`, which is attached now, has to carry out before anything is read from it."""
        own = [RaisedScope(scope, place=place) for scope in self._by_place.pop(place, {}).values()]
        owed, self._next = self._next, []
        return owed + own
