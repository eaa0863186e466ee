"""The invariants of the engine, checked after every turn."""

import numpy as np

from headwater.cache.invariants import check_invariants
from headwater.cache.page_pool import Owner
from headwater.clock import Clock
from headwater.engine.wiring import EngineParts
from headwater.simulation.checks.event_mirror import EventMirror
from headwater.simulation.checks.oracle import Oracle
from headwater.simulation.checks.pending_calls import PendingCalls
from headwater.simulation.checks.retirements import Retirements
from headwater.simulation.checks.violation import Violation, demand
from headwater.simulation.fakes.copier import FakeCopier, FakeCopy
from headwater.simulation.fakes.jobs import FakeJob, FakeJobRunner
from headwater.simulation.fakes.runner import FakeRunner
from headwater.simulation.fakes.shared_world import SharedWorld


class Promises:
    """Inspects the engine between two turns, and recounts all of its own figures."""

    def __init__(
        self,
        world: SharedWorld,
        parts: EngineParts,
        *,
        clock: Clock,
        runner: FakeRunner,
        copier: FakeCopier | None,
        jobs: FakeJobRunner,
        oracle: Oracle,
        calls: PendingCalls,
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

    def check(self, *, is_staging: bool, mirror: EventMirror | None = None) -> None:
        """Check all invariants after a turn. `is_staging`: weights are being staged for an operation."""
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
        copies = self._copier.open_copies if self._copier else []
        self._check_leases(copies)
        self._check_copies(copies)
        jobs = self._jobs.open_jobs
        self._check_store_calls(jobs)
        self._check_blockers(copies, jobs, is_staging=is_staging)
        self._calls.check_deadlines()

    def audit(self) -> None:
        """Check the books of the cache, page by page."""
        try:
            check_invariants(self._parts.cache)
        except Violation:
            raise
        except AssertionError as error:
            raise Violation("pages_add_up", str(error)) from error

    def check_drained(self) -> None:
        """With nothing in flight, all pages are free or in the tree."""
        cache = self._parts.cache
        demand(not cache.leases, "pages_come_back", f"{len(cache.leases)} leases are left")
        for tier, tier_pages in cache.tier_pages.items():
            is_back = tier_pages.num_available == tier_pages.pool.capacity
            demand(is_back, "pages_come_back", f"{tier.name}: {tier_pages.num_available} of {tier_pages.pool.capacity}")
        self.audit()

    # ------------------------------------------------------------------------------------------------

    def _check_books(self) -> None:
        """Compare the counts by owner with the owners' own lists, which is cheap enough for every turn."""
        cache, steps = self._parts.cache, self._runner.open_steps
        private = 0
        for lease in cache.leases:
            private += lease.num_private
            for pages in lease.superseded:
                private += len(pages)
        counted = cache.pool.count(Owner.PRIVATE)
        if private != counted:
            raise Violation("pages_add_up", f"{private} private pages held, {counted} counted")
        for tier, tier_pages in cache.tier_pages.items():
            counts = tier_pages.pool.counts()
            if sum(counts) != tier_pages.pool.capacity or min(counts) < 0:
                raise Violation("pages_add_up", f"{tier}: {counts}")
        for step in steps:
            num_free = cache.pool.num_owned(np.concatenate(step.read), Owner.FREE)
            demand(not num_free, "pages_outlive_steps", "a page is free that a step in flight uses")

    def _check_marks(self) -> None:
        """No page that a flush has covered is in the tree, where requests would match it."""
        self._retirements.check()
        for tier, tier_pages in self._parts.cache.tier_pages.items():
            marked = self._retirements.marked_pages(tier)
            if len(marked) and tier_pages.pool.num_owned(marked, Owner.TREE):
                page = next(page for page in marked.tolist() if tier_pages.pool.owner_of(page) is Owner.TREE)
                raise Violation("flushed_is_gone", f"page {page} on {tier.name} was flushed and is in the tree")

    def _check_requests(self) -> None:
        """Every open request is in exactly one queue."""
        scheduler = self._parts.scheduler
        places = (scheduler.running, scheduler.loading, scheduler.waiting, scheduler.grammars)
        found = [(request.client, request.rid) for place in places for request in place]
        active = self._oracle.active
        if self._oracle.num_undelivered == 0 and len(found) == len(active) and active.keys() == set(found):
            return  # as in every turn of an engine that keeps this promise
        active = [key for key, model in active.items() if model.is_delivered]
        if len(found) != len(active) or set(found) != set(active):
            lost = set(active).symmetric_difference(found)
            raise Violation("no_request_is_lost", f"{lost} of {len(active)}, {len(found)} in places")

    def _check_leases(self, copies: list[FakeCopy]) -> None:
        """Every lease belongs to a running request, a restore, a pin or a step in flight."""
        num_leases = len(self._parts.cache.leases)
        wanted = len(self._parts.scheduler.running) + self._parts.pinning.num_pins
        for copy in copies:
            if copy.kind == "restore" and not copy.is_begun:  # it holds a lease
                wanted += 1
        num_closing = 0
        for step in self._runner.open_steps:
            num_closing += len(step.read)
        if not wanted <= num_leases <= wanted + num_closing:
            text = f"{num_leases} leases, {wanted} wanted, {num_closing} rows in flight"
            raise Violation("leases_end", text)

    def _check_copies(self, copies: list[FakeCopy]) -> None:
        """The engine polls copies in every turn, even during a pause, and applies those that have ended."""
        for copy in copies:
            copy.num_turns += 1
            if copy.num_turns > copy.num_turns_allowed:
                text = f"{copy.kind} of turn {copy.turn} ended, and nobody looked"
                raise Violation("copies_are_taken_in", text)

    def _check_store_calls(self, jobs: list[FakeJob]) -> None:
        """A store call that takes too long is abandoned: a hanging store costs hits and nothing else."""
        storage = self._parts.cache.lower.storage
        if storage is None:
            return
        for job in jobs:
            if job.kind and self._clock.now() >= job.began_s + storage.settings.call_timeout_s:
                raise Violation("store_calls_are_given_up", f"{job.kind} waits since {job.began_s:.3f} s")

    def _check_blockers(self, copies: list[FakeCopy], jobs: list[FakeJob], *, is_staging: bool) -> None:
        """Compare the engine's blockers with a recount."""
        scheduler, admission = self._parts.scheduler, self._parts.scheduler.admission
        found = {"running": len(scheduler.running), "loading": len(scheduler.loading)}
        if is_staging:
            found["weight_update"] = 1
        if admission.may_run and admission.may_start:
            found["queued"] = len(scheduler.waiting)
            found["grammar"] = len(list(scheduler.grammars))
        elif admission.may_run:  # a request whose grammar is being compiled has never started
            active = self._oracle.active
            waiting = [active[r.client, r.rid].has_started for r in scheduler.waiting]
            found["queued"] = sum(waiting)
        for copy in copies:
            found[copy.kind] = found.get(copy.kind, 0) + 1
        for job in jobs:
            found[job.kind] = found.get(job.kind, 0) + 1
        expected = {name: count for name, count in found.items() if count and name}
        told = self._parts.blockers()
        if told != expected:
            raise Violation("blockers_agree", f"told {told}, found {expected}")
