"""The desired state of the server: every engine has to be in it before it takes requests."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import assert_never

import msgspec

from headwater.messages.adapters import LoadAdapter, UnloadAdapter
from headwater.messages.cache import AttachStorage, DetachStorage, PinGaveWay, PinPrefix, UnpinPrefix
from headwater.messages.control import ContinueGeneration, FlushCache, PauseGeneration
from headwater.messages.two_phase import Change
from headwater.messages.weights import MEMORY_TAGS, ReleaseMemory, ResumeMemory, SetWeightVersion, UpdateWeights


@dataclass(frozen=True, slots=True)
class WeightsStep:
    """A checkpoint that was put in place, and the identity of the weights from then on."""

    path: str
    load_format: str
    weights_id: str
    is_received: bool = False  # a staging folder of tensors that a trainer sent, not files of the user
    names: frozenset[str] = frozenset()  # of those tensors


@dataclass(frozen=True, slots=True)
class DesiredPin:
    """A prefix that some engines keep from eviction until `ends_at_s` (CLOCK_MONOTONIC)."""

    message: PinPrefix
    engines: frozenset[int]
    ends_at_s: float

    def is_in(self, flush: FlushCache, contents: Mapping[str, str]) -> bool:
        """Whether a flush ends the pin. The engine ends it by the same rule, however little of it the flush retires.

        `contents`: what the names of adapters mean.
        """
        salt_fits = flush.cache_salt in (None, self.message.cache_salt)
        if not salt_fits or flush.extra_key not in (None, self.message.extra_key):
            return False
        own = contents.get(self.message.lora_name, "")
        if flush.lora_name is not None and contents.get(flush.lora_name, "") != own:
            return False
        if flush.tiers and not set(flush.tiers) & set(self.message.tiers) and "device" not in flush.tiers:
            return False
        if flush.prefix_ids is None:
            return True
        return self.message.prompt_ids.startswith(flush.prefix_ids)  # of both, an id is four bytes


@dataclass(frozen=True, slots=True)
class DesiredAdapter:
    """A LoRA adapter: the name that requests use, where it lies, and the identity of its content."""

    name: str
    path: str
    adapter_id: str


@dataclass(frozen=True, slots=True)
class DesiredState:
    """Frozen: every decided change makes a new state. `revision` counts the changes."""

    weights: tuple[WeightsStep, ...]  # a whole checkpoint, then partial ones on top of it
    weight_version: str
    pause: PauseGeneration | None = None
    released: frozenset[str] = frozenset()
    store: AttachStorage | None = None
    store_revision: int = 0  # of the last change of the store; 0: the store of the command line
    pins: tuple[DesiredPin, ...] = ()
    adapters: tuple[DesiredAdapter, ...] = ()
    revision: int = 0

    @property
    def weights_id(self) -> str:
        return self.weights[-1].weights_id

    def after(
        self, change: Change, *, engines: frozenset[int], weights_id: str = "", is_whole: bool = True, now_s: float
    ) -> "DesiredState":
        """The state once `change` is in force on `engines`: on all, or on those that a pin names.

        `weights_id`: of the weights or the adapter that the change puts in place, if any; `is_whole`: the weights
        replace every earlier one.
        """
        desired = replace(self, revision=self.revision + 1, pins=tuple(p for p in self.pins if p.ends_at_s > now_s))
        match change:
            case UpdateWeights():
                step = _step_of(change, weights_id)
                label = desired.weight_version if change.weight_version is None else change.weight_version
                weights = (step,) if is_whole else (*_still_seen(desired.weights, step), step)
                released = desired.released - {"weights"}
                desired = replace(desired, weights=weights, weight_version=label, released=released)
                return desired if weights_id == self.weights_id else replace(desired, pins=())
            case LoadAdapter():
                adapter = DesiredAdapter(change.name, change.path, weights_id)
                return desired.with_adapters((*_others(desired.adapters, change.name), adapter), changed=change.name)
            case UnloadAdapter():
                return desired.with_adapters(_others(desired.adapters, change.name), changed=change.name)
            case SetWeightVersion():
                return replace(desired, weight_version=change.weight_version)
            case ReleaseMemory():
                released = desired.released | set(change.tags or MEMORY_TAGS)
                return replace(desired, released=released, pins=() if "kv_cache" in released else desired.pins)
            case ResumeMemory():
                desired = replace(desired, released=desired.released - set(change.tags or MEMORY_TAGS))
                if weights_id in ("", desired.weights_id):
                    return desired
                newest = replace(desired.weights[-1], weights_id=weights_id)  # the files had changed
                return replace(desired, weights=(*desired.weights[:-1], newest), weight_version="", pins=())
            case PauseGeneration():
                return replace(desired, pause=change)
            case ContinueGeneration():
                return replace(desired, pause=None)
            case AttachStorage():
                return replace(desired, store=_with_policies_of(change, desired.store), store_revision=desired.revision)
            case DetachStorage():
                return replace(desired, store=None, store_revision=desired.revision)
            case PinPrefix():
                pin = DesiredPin(change, engines, now_s + change.ttl_s)
                return replace(desired, pins=(*desired.pins, pin))
            case UnpinPrefix():
                return replace(desired, pins=tuple(_without(desired.pins, change.pin_id, engines)))
        assert_never(change)

    def with_adapters(self, adapters: tuple[DesiredAdapter, ...], *, changed: str) -> "DesiredState":
        """The state with these adapters. A pin keeps its content, under another name of it; else it has ended."""
        old, new = ({it.name: it.adapter_id for it in each} for each in (self.adapters, adapters))
        names = {content: name for name, content in new.items()}
        pins = []
        for pin in self.pins:
            if pin.message.lora_name == changed and old.get(changed) != new.get(changed):
                if (other := names.get(old.get(changed, ""))) is None:
                    continue
                pin = replace(pin, message=msgspec.structs.replace(pin.message, lora_name=other))
            pins.append(pin)
        return replace(self, adapters=adapters, pins=tuple(pins))

    def after_flush(self, flush: FlushCache) -> "DesiredState":
        """The state after a flush: without the pins that it has ended."""
        contents = {it.name: it.adapter_id for it in self.adapters}
        return replace(self, pins=tuple(pin for pin in self.pins if not pin.is_in(flush, contents)))

    def after_giving_way(self, notice: PinGaveWay, *, engine: int) -> "DesiredState":
        """The state after a pin has given way on `engine`: what it keeps there is set again, the rest is not."""
        pins = list(_without(self.pins, notice.pin_id, {engine}))
        for pin in self.pins:
            if notice.tiers and pin.message.pin_id == notice.pin_id and engine in pin.engines:
                message = msgspec.structs.replace(pin.message, tiers=notice.tiers)
                pins.append(replace(pin, message=message, engines=frozenset({engine})))
        return replace(self, pins=tuple(pins))

    def pins_on(self, engine: int, *, now_s: float) -> list[DesiredPin]:
        return [pin for pin in self.pins if engine in pin.engines and pin.ends_at_s > now_s]


def _step_of(change: UpdateWeights, weights_id: str) -> WeightsStep:
    if not change.weights_id:
        return WeightsStep(change.path, change.load_format, weights_id)
    return WeightsStep(change.path, "safetensors", weights_id, is_received=True, names=frozenset(change.names))


def _still_seen(steps: tuple[WeightsStep, ...], newest: WeightsStep) -> tuple[WeightsStep, ...]:
    """The steps that `newest` does not hide completely. A trainer that sends the same part for ever needs no more.

    Received weights are named by their sender, not after the ones before, so steps can be left out between them.
    """
    return tuple(step for step in steps if not (step.is_received and step.names and step.names <= newest.names))


def _with_policies_of(attach: AttachStorage, before: AttachStorage | None) -> AttachStorage:
    """A policy that is not given stays as it was."""
    if before is None:
        return attach
    return msgspec.structs.replace(
        attach,
        prefetch_policy=attach.prefetch_policy or before.prefetch_policy,
        write_policy=attach.write_policy or before.write_policy,
    )


def _others(adapters: tuple[DesiredAdapter, ...], name: str) -> tuple[DesiredAdapter, ...]:
    return tuple(adapter for adapter in adapters if adapter.name != name)


def _without(pins: Iterable[DesiredPin], pin_id: str, engines: Iterable[int]) -> Iterable[DesiredPin]:
    for pin in pins:
        if pin.message.pin_id != pin_id:
            yield pin
        elif left := pin.engines - set(engines):
            yield replace(pin, engines=left)
