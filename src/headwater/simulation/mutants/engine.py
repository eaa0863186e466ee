"""Mutants of scheduler, control plane, loop and storage."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

from msgspec import structs

from headwater.cache.lower_tiers import LowerTiers
from headwater.cache.prefetch import Prefetch
from headwater.cache.storage.calls import StorageCalls
from headwater.cache.storage.generations import StorageGenerations
from headwater.cache.storage.names import StorageNames
from headwater.control.control_plane import ControlPlane
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.flush import Flush
from headwater.control.memory import MemoryRelease
from headwater.control.operation import Hold
from headwater.control.pause import Pause
from headwater.control.pending_operations import PendingOperations
from headwater.control.weights import WeightUpdate
from headwater.engine.loop import EngineLoop
from headwater.messages.control import FlushResult
from headwater.messages.generation import GenerateBatch
from headwater.messages.wire import ToEngine
from headwater.scheduling.running import RunningRequests, Slots
from headwater.scheduling.scheduler import Scheduler
from headwater.simulation.mutants.registry import Patch, mutant
from headwater.storage import memory as memory_store


def _without(component: type, blocker: str) -> list[Patch]:
    right: Any = component.in_flight  # type: ignore[attr-defined]

    def in_flight(self: Any) -> dict[str, int]:
        return {name: count for name, count in right(self).items() if name != blocker}

    return [(component, "in_flight", in_flight)]


@mutant(profile="tiers")
def offloads_block_nobody() -> list[Patch]:
    """Copies to the host are missing from the blockers."""
    return _without(LowerTiers, "offload")


@mutant(profile="tiers")
def loading_blocks_nobody() -> list[Patch]:
    """Requests that wait for pages are missing from the blockers."""
    return _without(Scheduler, "loading")


@mutant(profile="training")
def updates_block_nobody() -> list[Patch]:
    """A weight update in progress is missing from the blockers."""
    return _without(WeightUpdate, "weight_update")


@mutant()
def queued_requests_block_nobody() -> list[Patch]:
    """Requests that could be admitted are missing from the blockers."""
    return _without(Scheduler, "queued")


@mutant()
def batches_lose_their_last() -> list[Patch]:
    """The last request of a batch is lost."""
    right = EngineLoop._dispatch

    def dispatch(self: EngineLoop, message: ToEngine, client: bytes) -> None:
        if isinstance(message, GenerateBatch):
            message = GenerateBatch(items=message.items[:-1])
        right(self, message, client)

    return [(EngineLoop, "_dispatch", dispatch)]


@mutant(profile="flush")
def flushes_are_answered_twice() -> list[Patch]:
    """The answer of a flush is sent twice."""
    right = ControlPlane.take_answers

    def take_answers(self: ControlPlane) -> list[Any]:
        answers = right(self)
        return answers + [(client, answer) for client, answer in answers if isinstance(answer, FlushResult)]

    return [(ControlPlane, "take_answers", take_answers)]


@mutant(profile="flush")
def cancelled_operations_are_not_answered() -> list[Patch]:
    """A cancelled operation is never answered."""
    right = PendingOperations.cancel

    def cancel(self: PendingOperations, message: Any, client: bytes) -> Any:
        with patch.object(self, "_reply", lambda client, answer: None):
            return right(self, message, client)

    return [(PendingOperations, "cancel", cancel)]


@mutant(profile="flush")
def deadlines_are_ignored() -> list[Patch]:
    """A flush waits for an idle moment beyond its deadline."""
    return [(Flush, "_still_busy", lambda self, moment: None)]


@mutant(profile="flush")
def deadlines_do_not_wake() -> list[Patch]:
    """A sleeping loop does not wake for the deadline of an operation."""
    return [(PendingOperations, "next_look_s", lambda self: None)]


@mutant(profile="flush")
def hold_is_ignored() -> list[Patch]:
    """New requests start although a flush holds them."""
    return [(Flush, "hold", property(lambda self: Hold.NOTHING))]


@mutant(profile="training")
def pause_is_ignored() -> list[Patch]:
    """Steps are launched during a pause."""
    right: Any = ControlPlane.hold

    def hold(self: ControlPlane) -> Hold:
        orders = self._engine.orders
        was_paused, orders.is_paused = orders.is_paused, False
        try:
            return right.fget(self)
        finally:
            orders.is_paused = was_paused

    return [(ControlPlane, "hold", property(hold))]


@mutant(profile="training")
def pause_is_never_answered() -> list[Patch]:
    """A pause waits for a step that does not exist."""
    return [(Pause, "look", lambda self, moment: None)]


@mutant(profile="flush")
def idle_is_not_waited_for() -> list[Patch]:
    """A flush of mode `idle` ignores the blockers."""
    right = Flush.look

    def look(self: Flush, moment: Any) -> Any:
        return right(self, replace(moment, blockers={}))

    return [(Flush, "look", look)]


@mutant(profile="training", seed=6)
def weights_are_swapped_under_a_step() -> list[Patch]:
    """An update does not wait for the step in flight."""
    right = WeightUpdate.__init__

    def init(self: WeightUpdate, message: Any, engine: ControlledEngine, *rest: Any) -> None:
        right(self, message, replace(engine, is_step_in_flight=lambda: False), *rest)

    return [(WeightUpdate, "__init__", init)]


@mutant(profile="training")
def released_memory_is_not_flushed() -> list[Patch]:
    """The KV memory is released while the tree still names its pages."""
    right = MemoryRelease.look

    def look(self: MemoryRelease, moment: Any) -> Any:
        cache = self._engine.cache
        with patch.object(cache, "retire", cache.preview):
            return right(self, moment)

    return [(MemoryRelease, "look", look)]


@mutant(seed=4)
def leases_end_before_their_step() -> list[Patch]:
    """A request that ends frees its pages while a step in flight uses them."""

    def release_leaving(self: RunningRequests) -> None:
        leaving, self._leaving = self._leaving, []
        for _, lease in leaving:
            self._cache.release(lease)

    return [(RunningRequests, "release_leaving", release_leaving)]


@mutant(seed=4)
def results_of_earlier_requests_are_taken() -> list[Patch]:
    """The result of a step goes to the request that has the slot now."""
    return [(Slots, "at", lambda self, slot, *, use: self._requests[slot])]


@mutant(seed=4)
def pages_are_shared_before_they_are_written() -> list[Patch]:
    """A request publishes pages that its step in flight has yet to write."""
    right = RunningRequests.publish

    def publish(self: RunningRequests, request: Any) -> None:
        request.progress.num_written = request.progress.num_computed
        right(self, request)

    return [(RunningRequests, "publish", publish)]


@mutant(profile="failing")
def failed_steps_are_published() -> list[Patch]:
    """Pages that a failed step wrote are shared."""
    right = Scheduler.fail

    def fail(self: Scheduler, plan: Any, error: Exception) -> int:
        for slot, use in zip(plan.slots.tolist(), plan.uses.tolist(), strict=True):
            request = self.running.slots.at(slot, use=use)
            if request is not None:
                request.progress.num_written = request.progress.num_computed
        return right(self, plan, error)

    return [(Scheduler, "fail", fail)]


@mutant(profile="failing")
def failed_steps_keep_a_slot() -> list[Patch]:
    """The slot of a failed step is never freed."""
    right = Scheduler.fail

    def fail(self: Scheduler, plan: Any, error: Exception) -> int:
        num_ended = right(self, plan, error)
        if num_ended:
            self.running.slots._free.pop()
        return num_ended

    return [(Scheduler, "fail", fail)]


@mutant(profile="failing")
def failed_steps_end_all_requests() -> list[Patch]:
    """A step that raises ends requests that were not in it."""
    right = Scheduler.fail

    def fail(self: Scheduler, plan: Any, error: Exception) -> int:
        return right(self, plan, error) + self.abort("", match="all", message="the engine failed")

    return [(Scheduler, "fail", fail)]


@mutant(profile="failing")
def failed_steps_leave_their_leases() -> list[Patch]:
    """If a step fails, pages of its requests that had already ended stay in use until another step ends."""
    right = Scheduler.fail

    def fail(self: Scheduler, plan: Any, error: Exception) -> int:
        running = self.running
        before = running._collected_step_id
        release, running.release_leaving = running.release_leaving, lambda: None  # type: ignore[method-assign]
        try:
            return right(self, plan, error)
        finally:
            running.release_leaving, running._collected_step_id = release, before  # type: ignore[method-assign]

    return [(Scheduler, "fail", fail)]


@mutant(profile="failing")
def failed_requests_go_on() -> list[Patch]:
    """A request whose step failed is computed again without an error."""

    def fail(self: Scheduler, plan: Any, error: Exception) -> int:
        self.running.collected(plan.step_id)
        for slot, use in zip(plan.slots.tolist(), plan.uses.tolist(), strict=True):
            request = self.running.slots.at(slot, use=use)
            if request is not None:
                self._retract(request)
        self.running.release_leaving()
        return 0

    return [(Scheduler, "fail", fail)]


@mutant(profile="store")
def store_is_read_while_it_is_flushed() -> list[Patch]:
    """A store is read before it has acknowledged a flush."""
    return [(StorageGenerations, "is_barred", lambda self, namespace: False)]


@mutant(profile="store")
def store_generations_are_not_in_the_key() -> list[Patch]:
    """Keys in the store lack the generation: a flush of the store has no effect."""
    right = StorageNames.bucket

    def bucket(self: StorageNames, namespace: Any, generations: Any) -> Any:
        found = right(self, namespace, tuple(0 for _ in generations))
        return structs.replace(found, scope_ids=(), generations=())

    return [(StorageNames, "bucket", bucket)]


@mutant(profile="store", seed=72)
def store_keys_forget_the_salt() -> list[Patch]:
    """Tenants find each other's pages in the store."""
    right_seed, right_scopes = StorageNames.seed, StorageNames.scopes

    def seed(self: StorageNames, namespace: Any) -> bytes:
        return right_seed(self, namespace._replace(cache_salt=""))

    def scopes(self: StorageNames, namespace: Any) -> tuple[bytes, ...]:
        return right_scopes(self, namespace._replace(cache_salt=""))

    return [(StorageNames, "seed", seed), (StorageNames, "scopes", scopes)]


@mutant(profile="tiers", seed=4)
def store_keys_forget_the_weights() -> list[Patch]:
    """Other weights find pages in the store."""
    right = StorageNames.seed

    def seed(self: StorageNames, namespace: Any) -> bytes:
        return right(self, namespace._replace(weights_id=""))

    return [(StorageNames, "seed", seed)]


@mutant(profile="store", seed=4)
def prefetches_survive_a_flush() -> list[Patch]:
    """Pages on their way up from the store arrive after the flush that covers them."""
    return [(Prefetch, "retire", lambda self, scope, page_size: False)]


@mutant(profile="store", seed=73)
def flipped_bits_are_served() -> list[Patch]:
    """The checksum of a stored page is not verified."""
    return [(memory_store, "find_defect", lambda key, header, payload: None)]  # type: ignore[list-item]


@mutant(profile="store", seed=1)
def unacknowledged_flushes_are_forgotten() -> list[Patch]:
    """Detaching a store forgets the flushes that it has not acknowledged."""
    return [(StorageGenerations, "unacknowledged", property(lambda self: []))]


@mutant(profile="store")
def hanging_stores_are_waited_for() -> list[Patch]:
    """The engine never gives up a hanging call of the store."""
    right = StorageCalls.__init__

    def init(self: StorageCalls, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **(kwargs | {"timeout_s": 1e9}))

    return [(StorageCalls, "__init__", init)]
