"""Mutants of sums, reports and events, of holds, of what a flush has yet to do, and of a loop that acts too early."""

from collections.abc import Callable
from typing import Any

from msgspec import structs

from headwater.cache.lower_tiers import LowerTiers
from headwater.cache.namespace import Tier
from headwater.cache.radix_tree import Node
from headwater.control import flush
from headwater.control.flush import Flush
from headwater.control.operation import Hold
from headwater.control.weights import WeightUpdate
from headwater.engine.kv_events_recorder import KvEventsRecorder
from headwater.engine.report import StateReporter
from headwater.engine.steps import Steps
from headwater.kv_events import BlockStored, short_hashes
from headwater.messages.control import FlushResult
from headwater.messages.state import EngineState
from headwater.scheduling.counters import Counters
from headwater.scheduling.grammar_queue import GrammarQueue
from headwater.scheduling.loading import LoadingRequests
from headwater.scheduling.plan import StepPlan
from headwater.scheduling.request import Request
from headwater.scheduling.scheduler import Scheduler
from headwater.simulation.mutants.registry import Patch, mutant


@mutant(profile="tiers")
def hits_on_the_host_are_not_capped() -> list[Patch]:
    """An answer counts all tokens that were restored for it, also those evicted again before it started."""
    right = LoadingRequests.attribute_hits

    def attribute_hits(self: LoadingRequests, request: Request, num_cached_tokens: int, counters: Counters) -> None:
        num_restored = request.loading.num_restored_tokens
        right(self, request, num_cached_tokens, counters)
        if num_restored > num_cached_tokens:
            request.loading.num_host_tokens += num_restored - num_cached_tokens

    return [(LoadingRequests, "attribute_hits", attribute_hits)]


@mutant(profile="tiers")
def hits_below_count_for_the_device_too() -> list[Patch]:
    """The metrics count tokens that were found on the host or in the store as hits on the device as well."""
    right = LoadingRequests.attribute_hits

    def attribute_hits(self: LoadingRequests, request: Request, num_cached_tokens: int, counters: Counters) -> None:
        right(self, request, num_cached_tokens, counters)
        counters.cached_tokens_device += request.loading.num_host_tokens + request.loading.num_storage_tokens

    return [(LoadingRequests, "attribute_hits", attribute_hits)]


@mutant(profile="failing")
def a_failed_step_counts_one_request() -> list[Patch]:
    """The metrics count one failed request for each failed step."""
    right = Scheduler.fail

    def fail(self: Scheduler, plan: Any, error: Exception) -> int:
        before, num_ended = self.counters.num_failed, right(self, plan, error)
        self.counters.num_failed = before + (num_ended > 0)
        return num_ended

    return [(Scheduler, "fail", fail)]


@mutant()
def retracted_tokens_count_again() -> list[Patch]:
    """The tokens that a retracted request has generated count as generated once more."""
    right = Scheduler._retract

    def retract(self: Scheduler, request: Request) -> None:
        right(self, request)
        self.counters.generated_tokens += request.num_outputs

    return [(Scheduler, "_retract", retract)]


@mutant(profile="tiers")
def pages_that_come_after_the_start_count_as_queueing() -> list[Patch]:
    """A request that is retracted reports its later waits for pages as a part of its time in the queue."""
    right = LoadingRequests.take_arrived

    def take_arrived(self: LoadingRequests) -> list[Request]:
        arrived = right(self)
        for request in arrived:
            if request.has_begun:
                request.loading.seconds += self._clock.now() - request.loading.since_s
        return arrived

    return [(LoadingRequests, "take_arrived", take_arrived)]


@mutant(profile="flush")
def every_flush_with_hold_holds() -> list[Patch]:
    """A flush that has cut its pages holds new requests until they are free."""
    return [(Flush, "hold", property(lambda self: Hold.STARTS if self._message.hold else Hold.NOTHING))]


@mutant(profile="training")
def updates_hold_while_they_are_read() -> list[Patch]:
    """No request starts while new weights are being read."""
    right: Any = WeightUpdate.hold
    return [(WeightUpdate, "hold", property(lambda self: max(Hold.STARTS, right.fget(self))))]


@mutant(profile="store")
def stores_get_no_second() -> list[Patch]:
    """A flush without a timeout does not wait for the store's acknowledgement."""
    return [(flush, "_STORE_GRACE_S", 0.0)]  # type: ignore[list-item]


@mutant(profile="store")
def stores_that_are_asked_are_not_named() -> list[Patch]:
    """The answer of a flush does not say that the store has yet to acknowledge it."""
    right = Flush._flushed

    def flushed(self: Flush, *args: Any, **kwargs: Any) -> FlushResult:
        return structs.replace(right(self, *args, **kwargs), pending=())

    return [(Flush, "_flushed", flushed)]


@mutant(profile="failing")
def pages_of_failed_steps_are_freed_before_the_recovery() -> list[Patch]:
    """The pages of a failed step are free while the runner may still execute it."""

    def fail(self: Steps, plan: StepPlan, error: Exception) -> None:
        recover, self._runner.recover = self._runner.recover, lambda: None  # type: ignore[method-assign]
        try:
            right(self, plan, error)
        finally:
            self._runner.recover = recover  # type: ignore[method-assign]
        recover()

    right = Steps._fail
    return [(Steps, "_fail", fail)]


@mutant(profile="grammars")
def the_loop_sleeps_through_compilations() -> list[Patch]:
    """A sleeping loop does not look whether a grammar has been compiled."""
    return [(GrammarQueue, "needs_polling", property(lambda self: False))]


@mutant(profile="tiers")
def the_loop_sleeps_through_copies() -> list[Patch]:
    """A sleeping loop does not look whether a copy or a call of the store has ended."""
    return [(LowerTiers, "needs_polling", property(lambda self: False))]


@mutant(profile="training")
def the_loop_sleeps_through_reading() -> list[Patch]:
    """A sleeping loop does not look whether new weights have been read."""
    return [(WeightUpdate, "is_polling", property(lambda self: False))]


def _reporting(change: Callable[[StateReporter], dict[str, int]]) -> list[Patch]:
    """Reports of the engine's state say what `change` makes of it."""
    right = StateReporter.__call__

    def report(self: StateReporter, call_id: str) -> EngineState:
        return structs.replace(right(self, call_id), **change(self))

    return [(StateReporter, "__call__", report)]


@mutant(profile="grammars")
def requests_with_grammars_are_not_reported() -> list[Patch]:
    """Requests whose grammars are being compiled are missing from those that wait in the metrics."""
    return _reporting(lambda self: {"num_waiting": len(self._scheduler.waiting)})


@mutant(profile="training")
def a_pause_reports_the_running_alone() -> list[Patch]:
    """While paused, the metrics leave out the requests that wait for the pause's end."""
    return _reporting(lambda self: {"num_paused": len(self._scheduler.running) if self._control.is_paused else 0})


@mutant()
def waiting_requests_are_reported_as_retracted() -> list[Patch]:
    """The metrics count each waiting request as retracted."""
    return _reporting(lambda self: {"num_retracted": len(self._scheduler.waiting)})


@mutant(profile="rough", seed=4)
def events_have_the_salt_for_the_key() -> list[Patch]:
    """An event of stored pages names the salt of its namespace where its extra key belongs."""
    right = KvEventsRecorder._add_stored

    def add_stored(self: KvEventsRecorder, *args: Any, **kwargs: Any) -> None:
        right(self, *args, **kwargs)
        event = self._events[-1]
        if isinstance(event, BlockStored):
            self._events[-1] = structs.replace(event, extra_key=event.cache_salt)

    return [(KvEventsRecorder, "_add_stored", add_stored)]


@mutant(profile="rough", seed=4)
def events_name_the_first_page_above() -> list[Patch]:
    """An event of stored pages names the first page of the node above as the page before them, not its last."""
    right = KvEventsRecorder.stored

    def stored(self: KvEventsRecorder, node: Node, tier: Tier) -> None:
        right(self, node, tier)
        event, above = self._events[-1], node.parent
        if isinstance(event, BlockStored) and above is not None and not above.is_root:
            (first,) = short_hashes(self._names.hashes(self._tree, above)[:1])
            self._events[-1] = structs.replace(event, parent_block_hash=first)

    return [(KvEventsRecorder, "stored", stored)]
