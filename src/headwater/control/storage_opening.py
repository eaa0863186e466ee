"""Stores on their way to being attached."""

from collections.abc import Callable

from headwater.cache.jobs import Job, JobAbandoned, JobRunner
from headwater.storage.backend import StorageBackend
from headwater.storage.errors import StorageError


class Opening:
    """A store that is being opened in a job. If it opens after it was given up, it is closed again."""

    def __init__(self, jobs: JobRunner, open_store: Callable[[], StorageBackend]) -> None:
        self._jobs = jobs
        self._open_store = open_store
        self._backend: StorageBackend | None = None  # open, not taken yet
        self._job = jobs.submit(self._open)

    def is_ready(self) -> bool:
        return self._job is None or self._job.is_done()

    def error(self) -> str | None:
        if self._job is None:
            return "too many calls of a store hang already"
        error = self._job.error
        if error is None:
            return None
        return str(error) if isinstance(error, ValueError | StorageError) else f"{type(error).__name__}: {error}"

    def abandon(self) -> None:
        """The store will not be taken: close it when it is open. Does not wait."""
        if self._job is None:
            return
        self._job.abandon()  # from here on the job closes what it opens
        backend, self._backend = self._backend, None
        if backend is not None:
            self._jobs.submit(lambda job: backend.close())

    def take(self) -> StorageBackend:
        """The open store, which the caller owns from now on. Once, when ready and without error."""
        backend, self._backend = self._backend, None
        assert backend is not None
        return backend

    def _open(self, job: Job) -> None:
        backend = self._open_store()
        try:
            if backend.kind == "redis":
                backend.usage()  # fails now if the server cannot be reached
            with job.pages():  # the lock of the job decides whether the loop still gets the store
                self._backend = backend
        except (JobAbandoned, StorageError):
            backend.close()
            raise


class Kept:
    """The store that is already attached: only its policies change."""

    def is_ready(self) -> bool:
        return True

    def error(self) -> str | None:
        return None

    def abandon(self) -> None:
        """There is nothing to give up."""
