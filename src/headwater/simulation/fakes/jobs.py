"""Jobs without threads. A job runs on the loop, after a scripted number of polls."""

import random
from collections.abc import Callable
from typing import Any

from headwater.cache.jobs import Job
from headwater.clock import Clock, ManualClock
from headwater.simulation.checks.violation import Violation

_KINDS = {
    "StorageWriter.persist": "persist",
    "StorageReader._look_up": "prefetch",
    "StorageReader._read_on": "prefetch",
}


class FakeJob(Job):
    """Runs at poll `num_polls`. A hanging job runs only after it was abandoned, like a late thread."""

    def __init__(self, work: Callable[[Job], Any], *, num_polls: int, hangs: bool, began_s: float) -> None:
        super().__init__(work)
        self.began_s = began_s
        self.kind = _KINDS.get(work.__qualname__.split(".<locals>")[0], "")  # the name of its blocker
        self._polls_left = num_polls
        self._hangs = hangs

    @property
    def is_open(self) -> bool:
        """Whether the loop waits for it."""
        return not self._has_ended and not self._is_abandoned

    def is_done(self) -> bool:
        if not self._has_ended and not self._hangs:
            self._polls_left -= 1
            if self._polls_left < 0:
                self.run()
                if isinstance(self.error, Violation):
                    raise self.error
        return self._has_ended

    def run_late(self) -> None:
        """Do the work after all, as a thread does that hung."""
        if not self._has_ended:
            self._hangs = False
            self._work_late()

    def _work_late(self) -> None:
        try:
            self.result = self._work(self)
        except Violation:
            raise
        except Exception as error:  # noqa: BLE001  as in Job.run
            self.error = error
        self._has_ended = True


class FakeJobRunner:
    """`cache.jobs.JobRunner` with scripted delays."""

    def __init__(self, *, seed: int = 0, clock: Clock | None = None) -> None:
        self.max_polls = 0
        self.hang_rate = 0.0
        self.hung: list[FakeJob] = []
        self._open: list[FakeJob] = []
        self._clock = clock or ManualClock()
        self._source = random.Random(seed)

    @property
    def open_jobs(self) -> list[FakeJob]:
        """The jobs that the loop waits for."""
        if self._open:
            self._open = [job for job in self._open if job.is_open]
        return self._open

    def submit(self, work: Callable[[Job], Any]) -> FakeJob:
        hangs = self._source.random() < self.hang_rate
        num_polls = self._source.randint(0, self.max_polls)
        job = FakeJob(work, num_polls=num_polls, hangs=hangs, began_s=self._clock.now())
        if hangs:
            self.hung.append(job)
        self._open = [*self.open_jobs, job]
        return job

    def release_hanging(self) -> None:
        """Let all hanging jobs run, late."""
        hung, self.hung = self.hung, []
        for job in hung:
            job.run_late()
