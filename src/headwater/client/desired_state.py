"""What the server was told: the state that every engine has to be in before it takes requests."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import assert_never

import msgspec
import numpy as np

from headwater.messages.base import unpack_ids
from headwater.messages.cache import AttachStorage, DetachStorage, PinPrefix, UnpinPrefix
from headwater.messages.control import ContinueGeneration, FlushCache, PauseGeneration
from headwater.messages.two_phase import Change
from headwater.messages.weights import ReleaseMemory, ResumeMemory, SetWeightVersion, UpdateWeights

MEMORY_TAGS = ("kv_cache", "weights")


@dataclass(frozen=True, slots=True)
class WeightsStep:
    """A checkpoint that was put in place, and the identity of the weights from then on."""

    path: str
    load_format: str
    weights_id: str


@dataclass(frozen=True, slots=True)
class DesiredPin:
    """A prefix that is to be kept from eviction on some engines until `ends_at_s` (CLOCK_MONOTONIC)."""

    message: PinPrefix
    engines: frozenset[int]
    ends_at_s: float

    def is_in(self, flush: FlushCache) -> bool:
        """Whether a flush ends it: as the engine has it, whatever the flush retires of what is held."""
        salt_fits = flush.cache_salt in (None, self.message.cache_salt)
        if not salt_fits or flush.extra_key not in (None, self.message.extra_key):
            return False
        if flush.tiers and not set(flush.tiers) & set(self.message.tiers) and "device" not in flush.tiers:
            return False
        if flush.prefix_ids is None:
            return True
        asked, held = unpack_ids(flush.prefix_ids), unpack_ids(self.message.prompt_ids)
        return len(asked) <= len(held) and bool(np.array_equal(asked, held[: len(asked)]))


@dataclass(frozen=True, slots=True)
class DesiredState:
    """Frozen: every decided change makes a new one. `revision` counts them."""

    weights: tuple[WeightsStep, ...]  # a whole checkpoint, then those that were laid over it
    weight_version: str
    pause: PauseGeneration | None = None
    released: frozenset[str] = frozenset()
    store: AttachStorage | None = None
    store_revision: int = 0  # of the last order about the store; 0: as the command line has it
    pins: tuple[DesiredPin, ...] = ()
    revision: int = 0

    @property
    def weights_id(self) -> str:
        return self.weights[-1].weights_id

    def after(
        self, change: Change, *, engines: frozenset[int], weights_id: str = "", is_whole: bool = True, now_s: float
    ) -> "DesiredState":
        """The state once `change` is in force on `engines`: on all, or for pins on those named.

        `weights_id`: of the weights that it puts in place, if it does; `is_whole`: nothing is left of those before.
        """
        told = replace(self, revision=self.revision + 1, pins=tuple(p for p in self.pins if p.ends_at_s > now_s))
        match change:
            case UpdateWeights():
                step = WeightsStep(change.path, change.load_format, weights_id)
                label = told.weight_version if change.weight_version is None else change.weight_version
                told = replace(told, weights=(step,) if is_whole else (*told.weights, step), weight_version=label)
                told = replace(told, released=told.released - {"weights"})
                return told if weights_id == self.weights_id else replace(told, pins=())
            case SetWeightVersion():
                return replace(told, weight_version=change.weight_version)
            case ReleaseMemory():
                released = told.released | set(change.tags or MEMORY_TAGS)
                return replace(told, released=released, pins=() if "kv_cache" in released else told.pins)
            case ResumeMemory():
                told = replace(told, released=told.released - set(change.tags or MEMORY_TAGS))
                if weights_id in ("", told.weights_id):
                    return told
                newest = replace(told.weights[-1], weights_id=weights_id)  # other files, taken as they are
                return replace(told, weights=(*told.weights[:-1], newest), weight_version="", pins=())
            case PauseGeneration():
                return replace(told, pause=change)
            case ContinueGeneration():
                return replace(told, pause=None)
            case AttachStorage():
                return replace(told, store=_with_policies_of(change, told.store), store_revision=told.revision)
            case DetachStorage():
                return replace(told, store=None, store_revision=told.revision)
            case PinPrefix():
                pin = DesiredPin(change, engines, now_s + change.ttl_s)
                return replace(told, pins=(*told.pins, pin))
            case UnpinPrefix():
                return replace(told, pins=tuple(_without(told.pins, change.pin_id, engines)))
        assert_never(change)

    def after_flush(self, flush: FlushCache) -> "DesiredState":
        """What a flush that was carried out leaves of the pins."""
        return replace(self, pins=tuple(pin for pin in self.pins if not pin.is_in(flush)))

    def pins_on(self, engine: int, *, now_s: float) -> list[DesiredPin]:
        return [pin for pin in self.pins if engine in pin.engines and pin.ends_at_s > now_s]


def _with_policies_of(attach: AttachStorage, before: AttachStorage | None) -> AttachStorage:
    """A policy that is not given stays as it was told before."""
    if before is None:
        return attach
    return msgspec.structs.replace(
        attach,
        prefetch_policy=attach.prefetch_policy or before.prefetch_policy,
        write_policy=attach.write_policy or before.write_policy,
    )


def _without(pins: Iterable[DesiredPin], pin_id: str, engines: Iterable[int]) -> Iterable[DesiredPin]:
    for pin in pins:
        if pin.message.pin_id != pin_id:
            yield pin
        elif left := pin.engines - set(engines):
            yield replace(pin, engines=left)
