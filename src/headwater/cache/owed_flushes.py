"""Flushes of storage that no store has acknowledged, and who has to carry them out."""

from headwater.cache.namespace import Scope
from headwater.cache.retirement import RaisedScope

_Counter = tuple[str | None, str | None]  # of a store: salt and key of the scope


class OwedFlushes:
    """What stores that were detached still owe, for as long as this engine lives.

    Whoever is attached next carries out what nobody has, so that the flush comes to its end. The stores that it was
    meant for owe it all the same: the one that was attached, or, if none was, all that have been. They may come back,
    with the old pages.
    """

    def __init__(self) -> None:
        self._next: list[RaisedScope] = []
        self._by_place: dict[str, dict[_Counter, Scope]] = {}  # of all stores that have been attached

    def add(self, raised: RaisedScope) -> None:
        """A flush while no store is attached."""
        self._next.append(raised)
        for owed in self._by_place.values():
            owed[_counter(raised.scope)] = raised.scope

    def left_by(self, place: str, unacknowledged: list[RaisedScope]) -> None:
        """The store at `place` is detached, and these are what it had not acknowledged."""
        self._next += [raised for raised in unacknowledged if raised.place is None]
        self._by_place[place] = {_counter(raised.scope): raised.scope for raised in unacknowledged}

    def take(self, place: str) -> list[RaisedScope]:
        """What the store at `place`, which is attached now, has to carry out before anything is read from it."""
        own = [RaisedScope(scope, place=place) for scope in self._by_place.pop(place, {}).values()]
        owed, self._next = self._next, []
        return owed + own


def _counter(scope: Scope) -> _Counter:
    return scope.cache_salt, scope.extra_key
