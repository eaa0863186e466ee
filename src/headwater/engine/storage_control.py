"""What the control plane may do to the storage tier: open, attach, detach, ask."""

from collections.abc import Callable
from typing import Any

from headwater.cache.jobs import Job, JobRunner
from headwater.cache.namespace import Tier
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.storage_names import StorageNames
from headwater.cache.storage_tier import PrefetchPolicy, StorageSettings, StorageTier
from headwater.clock import Clock
from headwater.messages import AttachStorage, StorageInfo
from headwater.storage.backend import StorageBackend
from headwater.storage.errors import StorageError
from headwater.storage.page_key import Fingerprint
from headwater.storage.registry import open_backend


class Opening:
    """A store that is being opened in a job."""

    def __init__(self, job: Job | None) -> None:
        self._job = job

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
        if self._job is not None:
            self._job.abandon()

    def backend(self) -> StorageBackend:
        assert self._job is not None
        return self._job.result


class StorageControl:
    """`control.ports.StoragePort` over the prefix cache."""

    def __init__(
        self,
        cache: PrefixCache,
        *,
        fingerprint: Fingerprint,
        jobs: JobRunner,
        clock: Clock,
        settings: StorageSettings,
        opener: Callable[..., StorageBackend] = open_backend,
    ) -> None:
        self._cache = cache
        self._names = StorageNames(fingerprint)
        self._jobs = jobs
        self._clock = clock
        self._settings = settings
        self._opener = opener

    def why_not(self) -> str | None:
        """Why no store can be attached at all; None if one can."""
        if self._cache.host is None:
            return "a store needs the host tier: start the server with --enable-hierarchical-cache"
        return None

    def open(self, message: AttachStorage) -> Opening:
        """Begin to open the store that `message` describes."""

        def work(job: Job) -> StorageBackend:
            backend = self._opener(
                message.kind,
                directory=message.directory,
                url=message.url,
                capacity_bytes=message.size_bytes,
            )
            if message.kind == "redis":
                backend.usage()  # a server that cannot be reached is better known now
            return backend

        return Opening(self._jobs.submit(work))

    def attach(self, opening: Opening, message: AttachStorage) -> StorageInfo:
        """Put the opened store in the place of the one attached, if any."""
        num_given_up = self._drop() if self._cache.storage is not None else 0
        if message.prefetch_policy is not None:
            self._settings = StorageSettings(
                policy=PrefetchPolicy(message.prefetch_policy),
                min_prefetch_tokens=self._settings.min_prefetch_tokens,
                call_timeout_s=self._settings.call_timeout_s,
            )
        self.attach_backend(opening.backend())
        return self.info(message.call_id, num_given_up=num_given_up, text="attached")

    def attach_backend(self, backend: StorageBackend) -> None:
        """Use an open store from now on."""
        cache = self._cache
        assert cache.host is not None and cache.transfers is not None
        cache.attach_storage(
            StorageTier(
                backend,
                tree=cache.tree,
                host=cache.books[Tier.HOST],
                host_pages=cache.host.pages,
                names=self._names,
                jobs=self._jobs,
                clock=self._clock,
                settings=self._settings,
                counters=cache.transfers.counters,
            )
        )

    def detach(self, call_id: str) -> StorageInfo:
        """Stop using the store, if one is attached."""
        if self._cache.storage is None:
            return StorageInfo(call_id=call_id, message="no store was attached")
        num_given_up = self._drop()
        return StorageInfo(call_id=call_id, num_given_up=num_given_up, message="detached")

    def info(self, call_id: str, *, num_given_up: int = 0, text: str = "") -> StorageInfo:
        storage = self._cache.storage
        if storage is None:
            return StorageInfo(call_id=call_id, message="no store is attached")
        usage: Any = storage.usage
        return StorageInfo(
            call_id=call_id,
            kind=storage.backend.kind,
            prefetch_policy=storage.settings.policy.value,
            breaker=storage.calls.breaker.state.value,
            num_pages=usage.num_pages if usage else 0,
            num_bytes=usage.num_bytes if usage else 0,
            capacity_bytes=usage.capacity_bytes if usage else None,
            in_flight=storage.in_flight(),
            counters=storage.backend.counters() | storage.calls.breaker.counters(),
            num_given_up=num_given_up,
            message=text,
        )

    def _drop(self) -> int:
        assert self._cache.storage is not None
        num_given_up = sum(self._cache.storage.in_flight().values())
        self._cache.detach_storage()
        return num_given_up
