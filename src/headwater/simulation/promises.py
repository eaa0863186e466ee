"""What is checked after every turn."""

from collections import Counter

import numpy as np

from headwater.cache.invariants import check_invariants
from headwater.cache.namespace import Scope
from headwater.cache.page_pool import Owner
from headwater.cache.retirement import Retirement
from headwater.clock import Clock
from headwater.engine.wiring import EngineParts
from headwater.simulation.calls import Calls
from headwater.simulation.event_mirror import EventMirror
from headwater.simulation.fake_copier import FakeCopier
from headwater.simulation.fake_jobs import FakeJobRunner
from headwater.simulation.fake_runner import FakeRunner
from headwater.simulation.oracle import Oracle
from headwater.simulation.request_model import RequestKey
from headwater.simulation.retirements import Retirements
from headwater.simulation.violation import Violation, demand
from headwater.simulation.world import World


class Promises:
    """Looks at the engine from outside, between two turns, and recounts everything it says of itself."""

    def __init__(
        self,
        world: World,
        parts: EngineParts,
        *,
        clock: Clock,
        runner: FakeRunner,
        copier: FakeCopier | None,
        jobs: FakeJobRunner,
        oracle: Oracle,
        calls: Calls,
        retirements: Retirements,
        audit_every: int,
    ) -> None:
        self._world = world
        self._parts = parts
        self._clock = clock
        self._runner = runner
        self._copier = copier
        self._jobs = jobs
        self._oracle = oracle
        self._calls = calls
        self._retirements = retirements
        self._audit_every = audit_every
        self._num_turns = 0
        self._retire = parts.cache.retire
        parts.cache.retire = self._checked_retire  # the only moment to see what a flush finds

    def check(self, *, is_staging: bool, mirror: EventMirror | None = None) -> None:
        """Everything that must hold after a turn. `is_staging`: weights are being brought for an operation."""
        self._num_turns += 1
        self._check_books()
        self._check_marks()
        if mirror is not None:
            mirror.follow()
        if self._num_turns % self._audit_every == 0:
            self.audit()
            if mirror is not None:
                mirror.audit()
        self._oracle.check_failed()
        self._check_requests()
        self._check_leases()
        self._check_copies()
        self._check_store_calls()
        self._check_blockers(is_staging=is_staging)
        self._calls.check_deadlines()

    def audit(self) -> None:
        """The books of the cache, page by page."""
        try:
            check_invariants(self._parts.cache)
        except Violation:
            raise
        except AssertionError as error:
            raise Violation("pages_add_up", str(error)) from error

    def check_drained(self) -> None:
        """Nothing is in flight: all pages are back."""
        cache = self._parts.cache
        demand(not cache.leases, "pages_come_back", f"{len(cache.leases)} leases are left")
        for tier, books in cache.books.items():
            is_back = books.num_available == books.pool.capacity
            demand(is_back, "pages_come_back", f"{tier.name}: {books.num_available} of {books.pool.capacity}")
        self.audit()

    # ------------------------------------------------------------------------------------------------

    def _checked_retire(self, scope: Scope) -> Retirement:
        """A flush cuts all pages in its scope out of the tree, and no others."""
        books = self._parts.cache.books
        due = self._retirements.num_pages_in_tree(scope, owners=lambda tier, page: books[tier].pool.owner_of(page))
        retirement = self._retire(scope)
        if scope.other_than_weights_id is None:
            cut = {tier: retirement.freed[tier] + retirement.retired[tier] for tier in due}
            demand(cut == due, "flush_is_exact", f"{scope}: cut {cut}, in the tree are {due}")
        return retirement

    def _check_books(self) -> None:
        """Counts by owner, against those who own: cheap enough for every turn."""
        cache = self._parts.cache
        private = sum(lease.num_private + sum(map(len, lease.superseded)) for lease in cache.leases)
        counted = cache.pool.count(Owner.PRIVATE)
        demand(private == counted, "pages_add_up", f"{private} private pages held, {counted} counted")
        for tier, books in cache.books.items():
            counts = [books.pool.count(owner) for owner in Owner]
            demand(sum(counts) == books.pool.capacity and min(counts) >= 0, "pages_add_up", (tier, counts))
        if self._runner.open_steps:
            used = np.concatenate([pages for step in self._runner.open_steps for pages in step.read])
            is_free = any(cache.pool.owner_of(page) is Owner.FREE for page in set(used.tolist()))
            demand(not is_free, "pages_outlive_steps", "a page is free that a step in flight uses")

    def _check_marks(self) -> None:
        """Requests can match nothing that a flush has covered."""
        self._retirements.check()
        for tier, books in self._parts.cache.books.items():
            for page in self._retirements.marked_pages(tier):
                is_gone = books.pool.owner_of(page) is not Owner.TREE
                demand(is_gone, "flushed_is_gone", f"page {page} on {tier.name} was flushed and is in the tree")

    def _check_requests(self) -> None:
        """Every request that has not ended is in exactly one place."""
        scheduler = self._parts.scheduler
        found: Counter[RequestKey] = Counter(
            (request.client, request.rid)
            for place in (scheduler.running, scheduler.loading, scheduler.waiting)
            for request in place
        )
        active = {key for key, model in self._oracle.active.items() if model.is_delivered}
        lost = active ^ found.keys()
        demand(not lost and max(found.values(), default=1) == 1, "no_request_is_lost", f"{lost} of {len(active)}")

    def _check_leases(self) -> None:
        """A lease belongs to a running request, to a load, to a pin, or to a step in flight."""
        num_leases = len(self._parts.cache.leases)
        copies = self._copier.open_copies if self._copier else []
        num_loads = sum(copy.kind == "restore" and not copy.is_begun for copy in copies)
        wanted = len(self._parts.scheduler.running) + num_loads + self._parts.pinning.num_pins
        num_closing = sum(len(step.read) for step in self._runner.open_steps)
        demand(
            wanted <= num_leases <= wanted + num_closing,
            "leases_end",
            f"{num_leases} leases, {wanted} wanted, {num_closing} rows in flight",
        )

    def _check_copies(self) -> None:
        """Copies are looked at every turn, also while paused: one that has ended is taken in."""
        for copy in self._copier.open_copies if self._copier else ():
            copy.num_turns += 1
            is_kept = copy.num_turns <= copy.num_turns_allowed
            demand(is_kept, "copies_are_taken_in", f"{copy.kind} of turn {copy.turn} ended, and nobody looked")

    def _check_store_calls(self) -> None:
        """A call of the store that takes too long is given up: a hanging store costs hits and nothing else."""
        storage = self._parts.cache.storage
        if storage is None:
            return
        for job in self._jobs.open_jobs:
            age_s = self._clock.now() - job.began_s
            is_kept = not job.kind or age_s < storage.settings.call_timeout_s
            demand(is_kept, "store_calls_are_given_up", f"{job.kind} waits since {age_s:.3f} s")

    def _check_blockers(self, *, is_staging: bool) -> None:
        """The engine's own idea of what keeps it from being idle, against a recount."""
        scheduler, admission = self._parts.scheduler, self._parts.scheduler.admission
        found: Counter[str] = Counter(copy.kind for copy in (self._copier.open_copies if self._copier else ()))
        found.update(job.kind for job in self._jobs.open_jobs if job.kind)
        found["running"] = len(scheduler.running)
        found["loading"] = len(scheduler.loading)
        found["weight_update"] = int(is_staging)
        if admission.may_run:
            found["queued"] = sum(
                admission.may_start or self._oracle.active[request.client, request.rid].has_started
                for request in scheduler.waiting
            )
        expected = {name: count for name, count in found.items() if count}
        told = self._parts.blockers()
        demand(told == expected, "blockers_agree", f"told {told}, found {expected}")
