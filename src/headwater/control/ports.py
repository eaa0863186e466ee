"""What the control plane needs from the rest of the engine. It imports neither scheduler nor cache."""

from dataclasses import dataclass
from typing import Any, Protocol

from headwater.messages.base import TokenIds
from headwater.messages.cache import AttachStorage, PinPrefix, StorageInfo, UnpinPrefix
from headwater.messages.control import PagesAndBytes
from headwater.messages.wire import ToClient


@dataclass(frozen=True, slots=True)
class FlushScope:
    """What a flush covers, in the words of the API. None means all."""

    tiers: tuple[str, ...]
    cache_salt: str | None = None
    extra_key: str | None = None
    prefix: TokenIds | None = None
    other_than_weights_id: str | None = None  # only the namespaces of other weights


class RetirementView(Protocol):
    """A retirement that was carried out (or previewed)."""

    @property
    def generation(self) -> int: ...

    @property
    def is_drained(self) -> bool:
        """Whether everything retired has come back."""
        ...

    @property
    def pending(self) -> tuple[str, ...]:
        """Tiers that have not acknowledged yet: a store is told off the loop."""
        ...

    @property
    def num_holders(self) -> int:
        """Requests that hold pages of it now; they publish none of them."""
        ...

    def freed(self) -> dict[str, PagesAndBytes]:
        """By tier: pages that were free at once."""
        ...

    def retired(self) -> dict[str, PagesAndBytes]:
        """By tier: pages that were still pinned when they were cut."""
        ...


class CachePort(Protocol):
    """The cache, as an operator sees it."""

    @property
    def tiers(self) -> tuple[str, ...]:
        """Enabled tiers, `device` first."""
        ...

    def retire(self, scope: FlushScope) -> RetirementView: ...

    def preview(self, scope: FlushScope) -> RetirementView: ...


class RequestsPort(Protocol):
    """All requests at once."""

    def abort_all(self, message: str) -> int:
        """End every request; returns how many."""
        ...

    def retract_all(self) -> int:
        """Take the pages of every running request, which then waits; returns how many."""
        ...

    def refuse_new(self, reason: str | None, *, cause: str = "behind") -> None:
        """Answer requests that come with a 503 that says why; None: `cause` is over. They wait for all causes."""
        ...

    @property
    def num_running(self) -> int: ...


class StagedWeights(Protocol):
    """New weights on their way: read and checked in a thread of their own, the model not touched yet."""

    def is_ready(self) -> bool:
        """Whether staging has ended, well or badly."""
        ...

    def error(self) -> str | None:
        """Why these weights cannot be used; None if they can. Only when ready."""
        ...

    @property
    def weights_id(self) -> str:
        """The identity of the weights as they will be after the swap. Only when ready and without error."""
        ...

    @property
    def num_tensors(self) -> int: ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, as the checkpoint's own files know them. Only when ready and without error."""
        ...

    @property
    def has_changed(self) -> bool:
        """Of a reload: the files hold other weights than were released. Only when ready, with or without error."""
        ...

    def abandon(self) -> None:
        """They will not be put in place: stop reading, let go of what was read. Never blocks."""
        ...

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left of the weights before. Only when ready and without error."""
        ...


class WeightsPort(Protocol):
    """The model's weights."""

    def stage(self, path: str, load_format: str) -> StagedWeights:
        """Begin to load; never blocks, never raises for the user's mistakes."""
        ...

    def reload(self, *, accepts_changes: bool = False) -> StagedWeights:
        """Begin to load again what was loaded last, after a release.

        If the files hold something else now, that is an error unless it is accepted.
        """
        ...

    def swap(self, staged: Any) -> None:
        """Put what `stage` or `reload` returned in place of the old weights. No step is in flight."""
        ...

    def release(self) -> int:
        """Free the weights' memory; returns bytes. No step is in flight."""
        ...

    def values(self, name: str, num_values: int) -> tuple[str, tuple[int, ...], tuple[float, ...]]:
        """dtype, shape and first values of a parameter. KeyError if there is none of that name."""
        ...


class KvMemoryPort(Protocol):
    """The memory behind the device's pages."""

    def release(self) -> int:
        """Free it; returns bytes. Nothing in it is of use to anyone."""
        ...

    def resume(self) -> int:
        """Allocate it again, contents undefined; returns bytes."""
        ...


class OpeningStorage(Protocol):
    """A store that is being opened off the loop."""

    def is_ready(self) -> bool: ...

    def error(self) -> str | None:
        """Why it could not be opened. Only when ready."""
        ...

    def abandon(self) -> None: ...


class StoragePort(Protocol):
    """The storage tier."""

    def why_not(self) -> str | None:
        """Why no store can be attached at all; None if one can."""
        ...

    def open(self, message: AttachStorage) -> OpeningStorage: ...

    def attach(self, opening: Any, message: AttachStorage) -> StorageInfo:
        """Put what `open` returned in the place of the store attached, if any."""
        ...

    def detach(self, call_id: str) -> StorageInfo: ...

    def info(self, call_id: str) -> StorageInfo: ...


class PinningPort(Protocol):
    """Prefixes that are kept from being evicted."""

    def has(self, pin_id: str) -> bool: ...

    def answer(self, message: PinPrefix | UnpinPrefix) -> ToClient:
        """Set or take off a pin; `Pins`, `Done` or `Failed`."""
        ...


class IdentityPort(Protocol):
    """Which weights requests are matched against from now on."""

    @property
    def weights_id(self) -> str: ...

    @property
    def weight_version(self) -> str: ...

    def set_weight_version(self, weight_version: str) -> None: ...

    def begin_weights(self, weights_id: str, *, end_ids: tuple[int, ...] = ()) -> None:
        """Requests that acquire from now on use namespaces of `weights_id`; running ones are marked.

        `end_ids` end answers, too, beside what has ended them since the start, while these weights serve.
        """
        ...


class StepPort(Protocol):
    """The step in flight, if any."""

    def is_step_in_flight(self) -> bool: ...


class BlockersPort(Protocol):
    """The only definition of idle: no blockers."""

    def __call__(self) -> dict[str, int]:
        """What is in flight, by name; empty when the engine is idle."""
        ...
