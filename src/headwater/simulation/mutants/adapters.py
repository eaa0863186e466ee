"""Mutants of LoRA adapters: whose KV a request matches, what a reload retires, and who switches."""

import itertools
from typing import Any

import msgspec

from headwater.cache.namespace import Scope, Tier
from headwater.cache.storage.names import StorageNames
from headwater.control import adapters as control_adapters
from headwater.control.adapters import AdapterLoad
from headwater.control.flush import Flush
from headwater.control.pinning import Pinning
from headwater.messages.cache import PinPrefix
from headwater.ranks import orders
from headwater.ranks.adapters import RankAdapters, RanksStagedAdapter
from headwater.scheduling.adapters import AdapterBoard, AdapterContent
from headwater.scheduling.request import Request
from headwater.scheduling.scheduler import Scheduler
from headwater.simulation.mutants.registry import Patch, mutant


@mutant(profile="adapters")
def adapter_is_not_in_the_namespace() -> list[Patch]:
    """Requests of one adapter match pages of another, and of the base model."""
    right = Request.namespace

    def namespace(self: Request, weights_id: str) -> Any:
        return right(self, weights_id)._replace(adapter="")

    return [(Request, "namespace", namespace)]


@mutant(profile="adapters")
def adapter_is_a_name_in_the_namespace() -> list[Patch]:
    """A reload under the same name keeps the namespace, and requests match pages of the old content."""
    right = Request.namespace

    def namespace(self: Request, weights_id: str) -> Any:
        return right(self, weights_id)._replace(adapter=self.options.lora_name)

    return [(Request, "namespace", namespace)]


@mutant(profile="adapters", seed=63)
def storage_keys_lack_the_adapter() -> list[Patch]:
    """Pages of all adapters have one name in the store."""
    right = StorageNames.seed

    def seed(self: StorageNames, namespace: Any) -> bytes:
        return right(self, namespace._replace(adapter=""))

    return [(StorageNames, "seed", seed)]


@mutant(profile="adapters")
def a_reload_retires_every_adapter() -> list[Patch]:
    """A reload retires the pages of the other adapters and of the base model as well."""
    return [(Scope, "has_namespace", _without_adapter(Scope.has_namespace))]


def _without_adapter(right: Any) -> Any:
    def has_namespace(self: Scope, namespace: Any) -> bool:
        return right(self, namespace if self.adapter is None else namespace._replace(adapter=self.adapter))

    return has_namespace


@mutant(profile="adapters")
def a_reload_retires_nothing() -> list[Patch]:
    """Pages of a content that no name means any more stay in the tree."""

    class Wrong:
        freed: dict[Tier, int] = dict.fromkeys(Tier, 0)
        retired = freed

    def place(self: AdapterLoad, *args: Any) -> Any:
        right_retire, control_adapters.retire_adapter = control_adapters.retire_adapter, lambda *_: Wrong()  # type: ignore
        try:
            return right_place(self, *args)
        finally:
            control_adapters.retire_adapter = right_retire

    right_place = AdapterLoad._place
    return [(AdapterLoad, "_place", place)]


@mutant(profile="adapters")
def a_content_with_two_names_is_retired_with_the_first() -> list[Patch]:
    """A reload of one name retires a content that another name still means."""
    return [(AdapterBoard, "_num_names", lambda self, content: 0)]


@mutant(profile="adapters")
def a_reload_overwrites_the_old_content() -> list[Patch]:
    """Running requests go on with the new content."""
    right = AdapterBoard.free_unused

    def free_unused(self: AdapterBoard, in_use: Any) -> None:
        right(self, ())

    return [(AdapterBoard, "free_unused", free_unused)]


@mutant(profile="adapters")
def waiting_requests_keep_the_old_content() -> list[Patch]:
    """Requests that have not begun when an adapter is replaced begin with the old content."""
    return [(Scheduler, "begin_adapter", lambda self, name, content: None)]


@mutant(profile="adapters")
def waiting_requests_survive_an_unload() -> list[Patch]:
    """Requests that have not begun when an adapter is unloaded begin with it."""
    return [(Scheduler, "end_adapter", lambda self, name: 0)]


@mutant(profile="adapters")
def retired_adapters_are_published() -> list[Patch]:
    """A request that returns from the queue publishes pages of a content that no name means any more."""

    def begin(self: AdapterBoard, name: str) -> AdapterContent | None:
        content = right(self, name)
        if content is not None:
            content.is_retired = True
        return content

    right = AdapterBoard.remove
    right_acquire = Scheduler._admit

    def admit(self: Scheduler, builder: Any) -> None:
        contents = [it for it in self.adapters._contents.values() if it.is_retired]
        for content in contents:
            content.is_retired = False
        right_acquire(self, builder)
        for content in contents:
            content.is_retired = True

    return [(AdapterBoard, "remove", begin), (Scheduler, "_admit", admit)]


@mutant(profile="adapters", seed=17)
def slots_of_adapters_are_never_freed() -> list[Patch]:
    """The slots of contents that no request uses stay taken, until no adapter can be loaded."""
    return [(AdapterBoard, "free_unused", lambda self, in_use: None)]


@mutant(profile="rank_adapters")
def a_rank_keeps_the_old_adapter_in_a_slot() -> list[Patch]:
    """A rank drops every third order to place an adapter: its share of the products is another adapter's."""
    right, count = RankAdapters.place, itertools.count(1)

    def place(self: RankAdapters, order: orders.PlaceAdapter) -> None:
        if next(count) % 3:
            right(self, order)

    return [(RankAdapters, "place", place)]


@mutant(profile="rank_adapters")
def an_adapter_is_placed_before_all_ranks_have_it() -> list[Patch]:
    """Rank 0 places an adapter when it is ready itself: a rank that refuses it, or is late, has nothing to place."""
    return [
        (RanksStagedAdapter, "is_ready", lambda self: self.own.is_ready()),
        (RanksStagedAdapter, "error", lambda self: self.own.error()),
    ]


@mutant(profile="adapter_scopes")
def a_flush_by_adapter_flushes_every_adapter() -> list[Patch]:
    """A flush that names an adapter retires the KV of all adapters and of the base model."""
    return [(Flush, "_adapter_id", lambda self: None)]


@mutant(profile="adapter_scopes")
def a_flush_of_the_base_model_flushes_nothing() -> list[Patch]:
    """A flush of the model without adapters finds no KV that is its own."""
    right = Flush._adapter_id
    return [(Flush, "_adapter_id", lambda self: right(self) or "the base model")]


@mutant(profile="adapter_scopes", seed=7)
def a_flush_by_adapter_means_the_content_at_its_arrival() -> list[Patch]:
    """A flush that waits while its adapter is reloaded leaves the KV of the new content."""
    right = Flush._adapter_id

    def arrive(self: Flush) -> Any:
        failed = right_arrive(self)
        arrived[self] = right(self)
        return failed

    arrived: dict[Flush, str | None] = {}
    right_arrive = Flush.arrive
    return [(Flush, "arrive", arrive), (Flush, "_adapter_id", lambda self: arrived.get(self, right(self)))]


@mutant(profile="adapter_scopes")
def a_pin_by_adapter_pins_the_base_model() -> list[Patch]:
    """A pin that names an adapter holds the pages that the model without adapters computed."""
    right = Pinning.pin

    def pin(self: Pinning, message: PinPrefix) -> Any:
        return right(self, msgspec.structs.replace(message, lora_name=""))

    return [(Pinning, "pin", pin)]
