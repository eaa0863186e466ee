"""The storage tier, seen from the loop: pages to and from a store that may be slow, broken or gone.

A failing store costs hits, never a request. Every call runs off the loop with a deadline, and a circuit breaker stops
calls of a failing store. Pages that were not stored or not found are counted by cause.
"""

import math
from dataclasses import dataclass
from enum import Enum

from headwater.cache.jobs import Job, JobRunner
from headwater.cache.namespace import Namespace, Scope, Tier
from headwater.cache.prefetch import Await, Prefetch
from headwater.cache.radix_tree import Node
from headwater.cache.retirement import RaisedScope
from headwater.cache.storage.calls import StorageCalls
from headwater.cache.storage.generations import StorageGenerations
from headwater.cache.storage.health import CallKind
from headwater.cache.storage.host_side import HostSide
from headwater.cache.storage.names import Generations
from headwater.cache.storage.reader import StorageReader
from headwater.cache.storage.writer import StorageWriter
from headwater.messages.base import TokenIds
from headwater.storage.backend import StorageBackend, StorageUsage

_REAP_EVERY_S = 1.0
_REAP_PAGES = 64


class PrefetchPolicy(Enum):
    """How long a request waits for storage: not at all, for all pages, or for a time that grows with its length."""

    BEST_EFFORT = "best_effort"
    WAIT_COMPLETE = "wait_complete"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """How a store is used."""

    policy: PrefetchPolicy = PrefetchPolicy.TIMEOUT
    min_prefetch_tokens: int = 64  # shorter sequences are computed
    call_timeout_s: float = 5.0
    wait_base_s: float = 2.0  # policy `timeout`: the base, and a part for every 1,024 tokens, up to the maximum
    wait_per_1024_tokens_s: float = 0.1
    max_wait_s: float = 30.0
    max_generations_wait_s: float = 0.25  # in a namespace that is new here, under any policy


class StorageTier:
    """One attached store; `place` identifies it. No method blocks."""

    def __init__(
        self,
        backend: StorageBackend,
        host: HostSide,
        *,
        jobs: JobRunner,
        settings: StorageSettings,
        place: str = "",
    ) -> None:
        self.backend = backend
        self.place = place
        self.settings = settings
        self.calls = StorageCalls(jobs, clock=host.clock, timeout_s=settings.call_timeout_s)
        self.generations = StorageGenerations(backend, host.names, self.calls, host.clock)
        self.writer = StorageWriter(backend, host, calls=self.calls, generations=self.generations)
        self.reader = StorageReader(
            backend, host, calls=self.calls, generations=self.generations, min_tokens=settings.min_prefetch_tokens
        )
        self._jobs = jobs
        self._clock = host.clock
        self._counters = host.counters
        self._reap_at_s = host.clock.now()
        self._is_reaping = False
        self.usage: StorageUsage | None = None  # as last reported

    def known_generations(self, namespace: Namespace) -> Generations | None:
        """The counters to mark pages computed now with; None if unknown."""
        return self.generations.known(namespace)

    def persist(self, node: Node) -> None:
        self.writer.persist(node)

    def prefetch(self, namespace: Namespace, tokens: TokenIds, *, num_known_tokens: int) -> Prefetch | None:
        """Begin to copy the pages of `tokens` that no other tier has to the host; None if that is not worth it."""
        is_new_here = self.generations.known(namespace) is None
        prefetch = self.reader.prefetch(namespace, tokens, num_known_tokens=num_known_tokens)
        if prefetch is not None and prefetch.awaited_until_s == math.inf:
            self._set_wait(prefetch, is_new_here=is_new_here)
        return prefetch

    def _set_wait(self, prefetch: Prefetch, *, is_new_here: bool) -> None:
        settings = self.settings
        if not len(prefetch.tokens) or settings.policy is PrefetchPolicy.BEST_EFFORT:
            prefetch.awaits = Await.GENERATIONS if is_new_here else Await.NOTHING
            prefetch.awaited_until_s = prefetch.started_s + settings.max_generations_wait_s
        elif settings.policy is PrefetchPolicy.TIMEOUT:
            wait_s = settings.wait_base_s + settings.wait_per_1024_tokens_s * len(prefetch.tokens) / 1024
            prefetch.wait_until_s = prefetch.started_s + min(wait_s, settings.max_wait_s)
            prefetch.awaited_until_s = prefetch.wait_until_s

    def retire(self, scope: Scope) -> int:
        """Drop prefetches that would attach pages in `scope`; returns how many."""
        return self.reader.retire(scope) if scope.tiers & {Tier.HOST, Tier.STORAGE} else 0

    def raise_generation(self, scope: Scope) -> RaisedScope:
        return self.generations.raise_scope(scope)

    def advance(self) -> bool:
        """Once a turn: handle calls that have ended, retry, reap. Returns whether any call ended."""
        ended = self.calls.advance()
        self.reader.advance()
        self.generations.advance()
        if not self._is_reaping and self._clock.now() >= self._reap_at_s:
            self._reap()
        return ended

    def in_flight(self) -> dict[str, int]:
        """Copies in flight. Raising a generation and reaping do not count, since they hold no pages."""
        found: dict[str, int] = {}
        if self.writer.reading:
            found["persist"] = len(self.writer.reading)
        if self.reader.prefetches:
            found["prefetch"] = len(self.reader.prefetches)
        return found

    @property
    def needs_polling(self) -> bool:
        """Whether calls are in flight whose end sends no message."""
        return self.calls.has_any

    def detach(self) -> None:
        """Give up all calls in flight, and close the backend off the loop."""
        self.calls.give_up_all("detached")
        self._jobs.submit(lambda job: self.backend.close())

    def _reap(self) -> None:
        self._is_reaping = True

        def work(job: Job) -> tuple[int, StorageUsage]:
            return self.backend.reap(max_pages=_REAP_PAGES), self.backend.usage()

        def finish(result: tuple[int, StorageUsage]) -> None:
            num_reaped, self.usage = result
            self._is_reaping = False
            self._counters.count("reaped_pages", num_reaped)
            self._reap_at_s = self._clock.now() + (0.01 if num_reaped else _REAP_EVERY_S)

        def fail(cause: str) -> None:
            self._is_reaping = False
            self._reap_at_s = self._clock.now() + _REAP_EVERY_S

        self.calls.begin(work, kind=CallKind.UPKEEP, finish=finish, fail=fail)
