"""The promises about compilations: none is used before its end, waits for ever, or is kept beyond the bound."""

from collections.abc import Callable
from typing import Any

from headwater.cache.jobs import Job
from headwater.clock import Clock
from headwater.messages.control import FlushCache, FlushResult
from headwater.scheduling.grammar_queue import GrammarLimits, GrammarQueue
from headwater.simulation.checks.violation import demand
from headwater.simulation.fakes.grammar import BROKEN, FakeCompiler
from headwater.simulation.fakes.jobs import FakeJob, FakeJobRunner


class GrammarPromises:
    """Watches the compilations of one engine."""

    def __init__(
        self, compiler: FakeCompiler, *, jobs: FakeJobRunner, limits: GrammarLimits, clock: Clock
    ) -> None:
        self._compiler = compiler
        self._limits = limits
        self._clock = clock
        self._open: list[FakeJob] = []  # at the end of the last turn, and those begun since
        self._submit = jobs.submit
        jobs.submit = self._submit_seen  # type: ignore[method-assign]

    def is_refused(self, text: str) -> bool:
        """Whether a request with this grammar may end with 400: it is no grammar, or hangs for too long."""
        now_s, limit_s = self._clock.now(), self._limits.compile_timeout_s
        # the difference, as the queue computes it: a sum of the same times may be rounded to the other side
        return text == BROKEN or any(job.result is None and now_s - job.began_s >= limit_s for job in self._open)

    def check_compiled(self, text: str) -> None:
        """A request with this grammar enters a slot."""
        demand(text in self._compiler.compiled, "compiled_before_start", f"a request runs with {text}")

    def check(self, grammars: GrammarQueue) -> None:
        """After a turn."""
        text = f"{grammars.num_cached} grammars are kept, {self._limits.max_cached} are allowed"
        demand(grammars.num_cached <= self._limits.max_cached, "side_caches_are_bounded", text)
        for request in grammars:
            waited_s = self._clock.now() - request.arrived_s
            is_due = waited_s < self._limits.compile_timeout_s
            demand(is_due, "compilations_are_given_up", f"{request.rid} has waited for {waited_s} s")
        self._open = [job for job in self._open if job.is_open]

    def check_flush(self, call: FlushCache, answer: FlushResult) -> None:
        """A flush of everything empties the side caches, and reports how much was there."""
        named = (call.cache_salt, call.extra_key, call.lora_name, call.prefix_ids)
        is_all = all(part is None for part in named)
        if not answer.success or answer.dry_run:
            return
        is_reported = ("grammars" in answer.side_caches) == is_all
        demand(is_reported, "side_caches_are_flushed", f"{answer.side_caches} after {call}")

    def _submit_seen(self, work: Callable[[Job], Any]) -> FakeJob:
        job = self._submit(work)
        self._open.append(job)
        return job
