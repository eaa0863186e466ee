"""The generations of a store as this engine knows them, and those that it is raising."""

from collections.abc import Callable, Sequence

from headwater.cache.jobs import Job
from headwater.cache.namespace import Namespace, Scope
from headwater.cache.retirement import RaisedScope
from headwater.cache.storage.calls import StorageCalls
from headwater.cache.storage.health import CallKind
from headwater.cache.storage.names import Generations, StorageNames
from headwater.clock import Clock
from headwater.storage.backend import StorageBackend

_RETRY_S = 0.5
_MAX_KNOWN = 10_000  # namespaces; there may be many salts, and dropped namespaces are asked for again
_MAX_ASKED = 64  # namespaces in one call, the most recent ones


class StorageGenerations:
    """Copies of the store's counters, by namespace. The store itself keeps the counters.

    Each page is marked with the copy at the time of its computation. The store refuses a page whose counter has grown
    since, so no page that any server computed before a flush is stored after it.
    """

    def __init__(self, backend: StorageBackend, names: StorageNames, calls: StorageCalls, clock: Clock) -> None:
        self._backend = backend
        self._names = names
        self._calls = calls
        self._clock = clock
        self._known: dict[Namespace, Generations] = {}  # the most recent one last
        self._raising: list[RaisedScope] = []
        self._missed: dict[Namespace, None] = {}  # known before the flush in progress; asked for after it
        self._retry_at_s: float | None = None  # None: an attempt is in progress, or there is nothing to raise

    def known(self, namespace: Namespace) -> Generations | None:
        """The counters of `namespace`; None if unknown: then pages computed now cannot be stored."""
        return self._known.get(namespace)

    def heard(self, namespace: Namespace, generations: Generations) -> None:
        if self.is_barred(namespace):
            return
        self._known.pop(namespace, None)
        self._known[namespace] = generations
        if len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]

    def ask(self, namespaces: Sequence[Namespace], *, ended: Callable[[], None] = lambda: None) -> None:
        """Ask the store for the counters of `namespaces`. `ended` is called when the answer is here or has failed."""
        scopes = {namespace: self._names.scopes(namespace) for namespace in namespaces[-_MAX_ASKED:]}

        def work(job: Job) -> dict[Namespace, Generations]:
            return {namespace: self._backend.generations(ids) for namespace, ids in scopes.items()}

        def finish(found: dict[Namespace, Generations]) -> None:
            for namespace, generations in found.items():
                self.heard(namespace, generations)
            ended()

        self._calls.begin(work, kind=CallKind.LOOK_UP, finish=finish, fail=lambda cause: ended())

    def forget(self, namespace: Namespace) -> None:
        """Drop the counters of `namespace`: the store has reported that they have grown."""
        self._known.pop(namespace, None)

    def is_barred(self, namespace: Namespace) -> bool:
        """Whether the store has yet to acknowledge a flush of `namespace`."""
        return any(raised.scope.has_namespace(namespace) for raised in self._raising)

    def raise_scope(self, scope: Scope) -> RaisedScope:
        """Make all pages in `scope` unreachable for every server on this store. Retries until it acknowledges."""
        raised = RaisedScope(scope)
        self._raising.append(raised)
        self._missed |= dict.fromkeys(ns for ns in self._known if scope.has_namespace(ns))
        self._forget_scope(scope)
        self._attempt()
        return raised

    @property
    def unacknowledged(self) -> list[RaisedScope]:
        return self._raising.copy()

    def take_over(self, unacknowledged: list[RaisedScope]) -> None:
        """Go on with flushes that were not acknowledged before a store was detached."""
        self._raising += unacknowledged
        if unacknowledged:
            self._attempt()

    def advance(self) -> None:
        if self._retry_at_s is not None and self._clock.now() >= self._retry_at_s:
            self._attempt()

    def _attempt(self) -> None:
        raising = self._raising.copy()
        ids = dict.fromkeys(self._names.scope(raised.scope) for raised in raising)  # two flushes may share a counter
        self._retry_at_s = None

        def work(job: Job) -> None:
            for scope_id in ids:
                self._backend.raise_generation(scope_id)

        def finish(_: None) -> None:
            for raised in raising:
                if not raised.is_acknowledged:
                    raised.is_acknowledged = True
                    self._raising.remove(raised)
                    self._forget_scope(raised.scope)
            missed, self._missed = list(self._missed), {}
            if missed:  # so that pages computed from now on can be stored
                self.ask(missed)

        def fail(cause: str) -> None:
            self._retry_at_s = self._clock.now() + _RETRY_S

        self._calls.begin(work, kind=CallKind.FLUSH, finish=finish, fail=fail, is_guarded=False)

    def _forget_scope(self, scope: Scope) -> None:
        for namespace in [ns for ns in self._known if scope.has_namespace(ns)]:
            del self._known[namespace]


_Counter = tuple[str | None, str | None]  # a counter of a store: salt and key of its scope


class UnacknowledgedFlushes:
    """Flushes that detached stores have not acknowledged, kept for as long as the engine lives.

    The store that is attached next carries out each flush that no store has carried out, so that the flush ends. The
    stores that the flush was meant for must carry it out as well when they are attached again, since they still hold
    the old pages: the store that was attached, or, if none was, every store that has been.
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
        """The store at `place` is detached without having acknowledged these flushes."""
        self._next += [raised for raised in unacknowledged if raised.place is None]
        self._by_place[place] = {_counter(raised.scope): raised.scope for raised in unacknowledged}

    def take(self, place: str) -> list[RaisedScope]:
        """The flushes that the store at `place` must carry out before anything is read from it: it is attached now."""
        own = [RaisedScope(scope, place=place) for scope in self._by_place.pop(place, {}).values()]
        owed, self._next = self._next, []
        return owed + own


def _counter(scope: Scope) -> _Counter:
    return scope.cache_salt, scope.extra_key
