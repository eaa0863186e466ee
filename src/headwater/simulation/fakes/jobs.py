"""Jobs without threads: they run on the loop when it looks at them, after as many looks as the script says."""

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
    """Runs at the `num_polls`-th look; one that hangs runs only when it has been given up, as a late thread would."""

    def __init__(self, work: Callable[[Job], Any], *, num_polls: int, hangs: bool, began_s: float) -> None:
        super().__init__(work)
        self.began_s = began_s
        self.kind = _KINDS.get(work.__qualname__.split(".<locals>")[0], "")  # the blocker it is counted as
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
        """What a thread that hung does in the end."""
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
    """`cache.jobs.JobRunner` in the hands of a script."""

    def __init__(self, *, seed: int = 0, clock: Clock | None = None) -> None:
        self.max_polls = 0
        self.hang_rate = 0.0
        self.hung: list[FakeJob] = []
        self._open: list[FakeJob] = []
        self._clock = clock or ManualClock()
        self._source = random.Random(seed)

    @property
    def open_jobs(self) -> list[FakeJob]:
        """Jobs that the loop waits for."""
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

    def let_go(self) -> None:
        """Every job that hangs comes back, late."""
        hung, self.hung = self.hung, []
        for job in hung:
            job.run_late()
