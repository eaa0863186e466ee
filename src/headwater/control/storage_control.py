"""The storage tier under control: stores are opened, attached, detached and described."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from headwater.cache.host_tier import WritePolicy
from headwater.cache.jobs import JobRunner
from headwater.cache.namespace import Tier
from headwater.cache.prefix_cache import PrefixCache
from headwater.cache.storage.host_side import HostSide
from headwater.cache.storage.names import StorageNames
from headwater.cache.storage.tier import PrefetchPolicy, StorageSettings, StorageTier
from headwater.clock import Clock
from headwater.control.storage_opening import Kept, Opening
from headwater.messages.cache import AttachStorage, StorageInfo
from headwater.storage.backend import StorageBackend
from headwater.storage.page_key import Fingerprint
from headwater.storage.registry import open_backend

Place = tuple[str, str | None, str | None, int | None]  # kind, directory, url and size, as asked for


class StorageControl:
    """Knows which store is attached to the prefix cache, and with which settings."""

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
        self._place: Place | None = None  # of the store attached

    def why_not(self) -> str | None:
        """Why no store can be attached at all; None if one can."""
        if self._cache.lower.host is None:
            return "a store needs the host tier: start the server with --enable-hierarchical-cache"
        return None

    def open(self, message: AttachStorage) -> Opening | Kept:
        """Begin to open the store that `message` describes, unless it is attached and only policies are to change."""
        has_policy = message.prefetch_policy is not None or message.write_policy is not None
        if has_policy and self._cache.lower.storage is not None and _place(message) == self._place:
            return Kept()

        def open_store() -> StorageBackend:
            return self._opener(
                message.kind,
                directory=message.directory,
                url=message.url,
                capacity_bytes=message.size_bytes,
            )

        return Opening(self._jobs, open_store)

    def attach(self, opening: Opening | Kept, message: AttachStorage) -> StorageInfo:
        """Put the opened store in the place of the attached one, if any; policies of `message` hold from now on."""
        if message.prefetch_policy is not None:
            self._settings = replace(self._settings, policy=PrefetchPolicy(message.prefetch_policy))
        if message.write_policy is not None:
            self._cache.lower.write_policy = WritePolicy(message.write_policy)
        storage = self._cache.lower.storage
        if isinstance(opening, Kept):
            assert storage is not None, "ready in the turn in which it was asked for"
            storage.settings = self._settings
            return self.info(message.call_id, text="policies changed")
        num_given_up = self._drop() if storage is not None else 0
        self.attach_backend(opening.take(), place=_place(message))
        return self.info(message.call_id, num_given_up=num_given_up, text="attached")

    def attach_backend(self, backend: StorageBackend, *, place: Place | None = None) -> None:
        """Use an open store from now on. `place` says which store it is."""
        cache = self._cache
        self._place = place
        assert cache.lower.host is not None and cache.lower.transfers is not None
        host = HostSide(
            tree=cache.tree,
            tier=cache.tier_pages[Tier.HOST],
            memory=cache.lower.host.pages,
            names=self._names,
            counters=cache.lower.transfers.counters,
            clock=self._clock,
        )
        cache.lower.attach(StorageTier(backend, host, jobs=self._jobs, settings=self._settings, place=_name(place)))

    @property
    def place_name(self) -> str:
        """Which store is attached; empty if none is, or one whose place is not known."""
        return _name(self._place) if self._cache.lower.storage is not None else ""

    def detach(self, call_id: str) -> StorageInfo:
        """Stop using the store, if one is attached."""
        if self._cache.lower.storage is None:
            return StorageInfo(call_id=call_id, message="no store was attached")
        num_given_up = self._drop()
        return StorageInfo(call_id=call_id, num_given_up=num_given_up, message="detached")

    def info(self, call_id: str, *, num_given_up: int = 0, text: str = "") -> StorageInfo:
        storage = self._cache.lower.storage
        if storage is None:
            return StorageInfo(call_id=call_id, write_policy=self._write_policy, message="no store is attached")
        usage: Any = storage.usage
        return StorageInfo(
            call_id=call_id,
            kind=storage.backend.kind,
            prefetch_policy=storage.settings.policy.value,
            write_policy=self._write_policy,
            breaker=storage.calls.breaker.state.value,
            num_pages=usage.num_pages if usage else 0,
            num_bytes=usage.num_bytes if usage else 0,
            capacity_bytes=usage.capacity_bytes if usage else None,
            in_flight=storage.in_flight(),
            counters=storage.backend.counters() | storage.calls.breaker.counters(),
            num_given_up=num_given_up,
            message=text,
            trouble=storage.calls.health.trouble(),
        )

    @property
    def _write_policy(self) -> str:
        return self._cache.lower.write_policy.value if self._cache.lower.host is not None else ""

    def _drop(self) -> int:
        assert self._cache.lower.storage is not None
        num_given_up = sum(self._cache.lower.storage.in_flight().values())
        self._cache.detach_storage()
        return num_given_up


def _place(message: AttachStorage) -> Place:
    return message.kind, message.directory, message.url, message.size_bytes


def _name(place: Place | None) -> str:
    """The same for the same store, however its folder is written and whatever its size."""
    if place is None:
        return ""
    kind, directory, url, _ = place
    return f"{kind} {os.path.realpath(Path(directory).expanduser()) if directory else url or ''}"
