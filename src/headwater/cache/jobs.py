"""Work that may block, off the loop: calls of a storage backend, in threads that are never waited for."""

import queue
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Protocol


class JobAbandoned(Exception):
    """The loop has abandoned the job, which must not touch pages any more."""


class Job:
    """One piece of blocking work. The loop polls `is_done`, and gives the job up with `abandon`.

    The work touches pages only inside `pages()`, so it touches none after `abandon` has returned.
    """

    def __init__(self, work: Callable[["Job"], Any]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._has_ended = False  # set last, by the thread that runs it; the loop polls it without the lock
        self._is_abandoned = False
        self.result: Any = None
        self.error: Exception | None = None

    def is_done(self) -> bool:
        return self._has_ended

    def abandon(self) -> None:
        """Give the job up. Waits for a copy of pages under way at most, never for I/O."""
        with self._lock:
            self._is_abandoned = True

    @contextmanager
    def pages(self):
        """A block in which the job may touch its pages. Raises `JobAbandoned` if the loop has taken them back."""
        with self._lock:
            if self._is_abandoned:
                raise JobAbandoned
            yield

    def run(self) -> None:
        """Do the work. An exception is kept in `error`."""
        try:
            if not self._is_abandoned:
                self.result = self._work(self)
        except Exception as error:  # noqa: BLE001  an error leaves a thread only through the job
            self.error = error
        finally:
            self._has_ended = True


class JobRunner(Protocol):
    """Runs jobs in order of arrival, a few at a time."""

    def submit(self, work: Callable[[Job], Any]) -> Job | None:
        """Begin or queue `work`; None if too many jobs are queued or hang already."""
        ...


class ThreadJobRunner:
    """A few daemon threads. A thread that hangs in an abandoned job is replaced, up to a bound."""

    def __init__(self, *, name: str, num_threads: int = 2, max_queued: int = 256, max_hung: int = 8) -> None:
        self._name = name
        self._num_threads = num_threads
        self._max_queued = max_queued
        self._max_hung = max_hung
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._running: set[Job] = set()
        self._lock = threading.Lock()
        self._num_alive = 0

    def submit(self, work: Callable[[Job], Any]) -> Job | None:
        with self._lock:
            num_hung = sum(1 for job in self._running if job._is_abandoned)
            if self._queue.qsize() >= self._max_queued or num_hung > self._max_hung:
                return None
            job = Job(work)
            self._queue.put(job)
            if self._num_alive - num_hung < self._num_threads:
                self._num_alive += 1
                threading.Thread(target=self._serve, name=self._name, daemon=True).start()
            return job

    def _serve(self) -> None:
        while True:
            job = self._queue.get()
            with self._lock:
                self._running.add(job)
            job.run()
            with self._lock:
                self._running.remove(job)
                num_hung = sum(1 for it in self._running if it._is_abandoned)
                if self._num_alive - num_hung > self._num_threads:  # this thread was replaced while it hung
                    self._num_alive -= 1
                    return
