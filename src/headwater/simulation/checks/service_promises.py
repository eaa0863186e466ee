"""The promises of the scheduler: which requests it accepts, the order of service, and correct counts."""

import math
from collections.abc import Callable
from itertools import compress
from typing import Any

from headwater.messages.control import (
    CancelOperation,
    ContinueGeneration,
    FlushCache,
    FlushResult,
    PauseGeneration,
    PauseResult,
)
from headwater.messages.generation import Abort, Generate
from headwater.messages.weights import SetWeightVersion, UpdateWeights, WeightsUpdated, WeightVersionSet
from headwater.messages.wire import ToClient, ToEngine
from headwater.scheduling.limits import Admission, SchedulerLimits
from headwater.scheduling.request import Request
from headwater.scheduling.scheduler import Scheduler
from headwater.simulation.checks.oracle import Oracle
from headwater.simulation.checks.pending_calls import PendingCall
from headwater.simulation.checks.request_model import RequestKey, RequestModel
from headwater.simulation.checks.violation import Violation, demand
from headwater.simulation.fakes.canary import with_adapter

_MIN_SHARED_TOKENS = 64  # requests do not wait for another's computation of a shorter prefix


class ServicePromises:
    """Watches the scheduler of one engine, and compares its decisions with the requests it had."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        oracle: Oracle,
        limits: SchedulerLimits,
        is_fcfs: bool,
        advance: Callable[[], None],
        is_quiet: Callable[[], bool],
    ) -> None:
        """`advance` is that of the control plane; the caller replaces it by `checked_advance`.

        `is_quiet`: whether nothing is held.
        """
        self._scheduler = scheduler
        self._oracle = oracle
        self._limits = limits
        self._is_fcfs = is_fcfs
        self._advance = advance
        self._is_quiet = is_quiet
        self._was_quiet = False  # at the last `advance`
        self._is_advancing = False
        self._num_running = 0  # at the last `advance`
        self._ran: list[RequestModel] = []  # the running requests at the last `advance`: a step may end them since
        self._ended_all: list[int] = []  # counts of aborts of all requests in this turn, by the control plane
        self._relabelled: list[int] = []  # the same, by messages
        self._retracted: list[int] = []
        self._paused: dict[str, int] = {}  # the count that each pause must report, by call id
        self._cancelled: set[str] = set()  # calls cancelled in this turn
        self._add, self._abort, self._retract_all = scheduler.add, scheduler.abort, scheduler.retract_all
        self._begin_weights = scheduler.begin_weights
        scheduler.begin_weights = self._checked_begin_weights  # type: ignore[method-assign]
        scheduler.add = self._checked_add  # type: ignore[method-assign]
        scheduler.abort = self._checked_abort  # type: ignore[method-assign]
        scheduler.retract_all = self._checked_retract_all  # type: ignore[method-assign]

    def checked_advance(self) -> None:
        self._is_advancing = True
        self._num_running = len(self._scheduler.running)
        active = self._oracle.active
        self._ran = [active[key] for it in self._scheduler.running if (key := (it.client, it.rid)) in active]
        self._was_quiet = not self._scheduler.cache.leases and self._is_quiet()
        self._advance()
        self._is_advancing = False

    def end_turn(self, messages: list[ToEngine], answers: list[tuple[PendingCall, ToClient]]) -> None:
        """The engine has read `messages` in this turn, and clients have received `answers`."""
        if messages:
            self._bind_pauses(_lasting_pauses(messages))
            self._cancelled = {m.started_by_call for m in messages if isinstance(m, CancelOperation)}
            if any(isinstance(message, Abort) and message.match == "all" for message in messages):
                self._relabelled.clear()  # which of the counts is the abort's own cannot be seen
        for call, answer in answers:
            self._check_count(answer, call.message)
        self._check_order()
        self._check_loading()
        self._ended_all.clear()
        self._relabelled.clear()
        self._retracted.clear()
        self._cancelled.clear()

    # --- admission ----------------------------------------------------------------------------------

    @property
    def admission(self) -> Admission:
        """What may run, as the engine has said in this turn."""
        return self._scheduler.admission

    def _checked_add(self, message: Generate, *, client: bytes) -> None:
        """A request is refused if and only if the queue is full."""
        key, is_full = (client, message.rid), self._is_full_for(message)
        is_new = not self._is_in_place(key)
        name = message.options.lora_name
        lacks_adapter = bool(name) and self._scheduler.adapters.find(name) is None  # checked by AdapterPromises
        self._add(message, client=client)
        model = self._oracle.active.get(key)
        if model is None or not is_new:
            return
        is_in = self._is_in_place(key)
        if model.is_refused:  # its answer is on its way, and the rid is free
            model.followers.append((message, is_full))
        else:
            model.is_refused = not is_in
            model.must_be_refused = is_full
        if lacks_adapter:
            demand(not is_in, "served_if_loaded", f"{message.rid} is queued, and no adapter {name!r} is loaded")
        elif not model.is_too_long and is_in == is_full:
            text = f"{message.rid} arrived at a queue that had {'no' if is_full else 'a'} place for it"
            raise Violation("refused_only_if_full", f"{text}, and {'is in' if is_in else 'was refused'}")

    def _is_full_for(self, message: Generate) -> bool:
        """Whether the queue, or the share of it that the request's key may have, is full."""
        limits, num_tokens = self._limits, len(message.prompt_ids) // 4
        waiting = [*self._scheduler.waiting, *self._scheduler.grammars]
        models = [self._oracle.active.get((request.client, request.rid)) for request in waiting]
        is_own = [model is not None and model.message.account == message.account for model in models]
        own = list(compress(waiting, is_own))
        for requests, share in ((waiting, 1.0), (own, limits.max_queue_share)):
            if len(requests) >= (limits.max_queued if share == 1 else max(1, int(limits.max_queued * share))):
                return True
            num_waiting = sum(len(request.tokens) for request in requests)
            max_tokens = math.inf if limits.max_queued_tokens is None else int(limits.max_queued_tokens * share)
            if requests and num_waiting + num_tokens > max_tokens:
                return True
        return False

    # --- ending and retracting ----------------------------------------------------------------------

    def _checked_abort(self, rid: str, *, match: str, message: str) -> int:
        due = {key for key in self._places() if _is_meant(key[1], rid, match)}
        count = self._abort(rid, match=match, message=message)
        left = due & self._places()
        demand(not left, "abort_ends", f"an abort of {rid!r} ({match}) spares {left}")
        demand(count == len(due), "counts_are_right", f"an abort ended {len(due)} and says {count}")
        if match == "all":
            (self._ended_all if self._is_advancing else self._relabelled).append(len(due))
        return count

    def _checked_retract_all(self) -> int:
        running = self._running()
        count = self._retract_all()
        spared = running & self._running()
        demand(not spared, "retract_spares_none", f"{spared} keep their pages")
        demand(count == len(running), "counts_are_right", f"{len(running)} were retracted, {count} are reported")
        self._retracted.append(count)
        return count

    def _bind_pauses(self, pauses: list[PauseGeneration]) -> None:
        """Assign the counts of this turn to its pauses; those of one mode are in the same order."""
        for mode, counts in (("abort", self._ended_all), ("retract", self._retracted)):
            calls = [pause.call_id for pause in pauses if pause.mode == mode]
            if len(calls) == len(counts):  # else a weight update has ended requests as well
                self._paused |= dict(zip(calls, counts, strict=True))
        if not self._ended_all and not self._retracted:
            self._paused |= {pause.call_id: self._num_running for pause in pauses if pause.mode == "in_place"}

    def _check_count(self, answer: ToClient, call: Any) -> None:
        reported: int
        match answer:
            case FlushResult() if isinstance(call, FlushCache):
                self._check_flush(answer, call)
                return
            case PauseResult():
                reported, right = answer.num_requests, self._paused.pop(answer.call_id, answer.num_requests)
            case WeightsUpdated() if isinstance(call, UpdateWeights):
                is_labelled = call.weight_version in (None, answer.weight_version)
                demand(is_labelled, "labels_are_reported", f"{answer.weight_version} after {call}")
                right = self._ended_all[0] if len(self._ended_all) == 1 else answer.num_aborted
                reported, right = answer.num_aborted, right if call.abort_all_requests else 0
                if not self._ended_all and not self._retracted:
                    kept = f"{answer.num_kept} requests are reported to go on, {self._num_running} ran"
                    demand(answer.num_kept == self._num_running, "counts_are_right", kept)
            case WeightVersionSet() if isinstance(call, SetWeightVersion):
                right = self._relabelled[0] if len(self._relabelled) == 1 else answer.num_aborted
                reported, right = answer.num_aborted, 0 if call.abort_all_requests is False else right
            case _:
                return
        demand(reported == right, "counts_are_right", f"{answer}, but there were {right}")

    def _check_flush(self, answer: FlushResult, call: FlushCache) -> None:
        if answer.status == 202 and not answer.drained and call.call_id not in self._cancelled:
            demand(not self._was_quiet, "drained_is_drained", f"{answer}, though nothing was held")
        if answer.success:
            asked = call.tiers or ("device", "host")
            warm = {tier.name.lower() for tier in self._scheduler.cache.tier_pages}.difference(asked)
            reported = set(answer.still_warm) - {"storage"}  # which may have been attached or detached in this turn
            demand(reported == warm, "still_warm_is_reported", f"{reported} after {call}, left are {warm}")

    def _checked_begin_weights(self, weights_id: str, *, end_ids: tuple[int, ...] = ()) -> None:
        """Count the update for all requests that have begun: their last output reports where it took effect."""
        scheduler = self._scheduler
        for place in (scheduler.running, scheduler.loading, scheduler.waiting, scheduler.grammars):
            for request in place:
                model = self._oracle.active.get((request.client, request.rid))
                if model is not None and (request.is_running or request.num_outputs):
                    model.num_weights_changes += 1
        self._begin_weights(weights_id, end_ids=end_ids)

    # --- order --------------------------------------------------------------------------------------

    def _check_order(self) -> None:
        """No later or lower-priority request overtakes another, unless that one waits for pages or is held."""
        entered = self._oracle.entered_now
        if not entered or not len(self._scheduler.waiting):
            return
        last = max(entered, key=self._place)
        may_start = self._scheduler.admission.may_start
        for request in self._scheduler.waiting:
            model = self._oracle.active[request.client, request.rid]
            if self._place(model) >= self._place(last) or not (may_start or model.has_started):
                continue
            is_excused = self._waits_for_prefix(request)
            demand(is_excused, "served_in_order", f"{last.rid} is served before {model.rid}")

    def _place(self, model: RequestModel) -> tuple[int, int]:
        return (-model.message.options.priority, model.number if self._is_fcfs else 0)

    def _waits_for_prefix(self, request: Request) -> bool:
        """Whether a request of the same namespace computes enough of its prefix to be worth waiting for.

        It ran when this was decided. Its step may have raised since.
        """
        model = self._oracle.active[request.client, request.rid]
        head = model.tokens[:_MIN_SHARED_TOKENS]
        if len(head) < _MIN_SHARED_TOKENS:
            return False
        running = [self._oracle.active[key] for key in self._running() if key in self._oracle.active]
        namespace = with_adapter(model.base_namespace, request.adapter.adapter_id if request.adapter else "")
        found = (*running, *self._ran, *self._oracle.entered_now)
        return any(each.namespace == namespace and each.tokens[: len(head)] == head for each in found)

    def _check_loading(self) -> None:
        """A request that waits for pages from a store waits for its own namespace and tokens."""
        for request in self._scheduler.loading:
            prefetch = request.loading.prefetch
            if prefetch is None:
                continue
            model = self._oracle.active[request.client, request.rid]
            options = model.message.options
            is_own = prefetch.namespace[:2] == (options.cache_salt, options.extra_key)
            if model.message.logprobs is None:  # else the prefetch is shorter than its prompt
                shared = min(len(prefetch.tokens), len(model.prompt) - 1)
                is_own = is_own and prefetch.tokens[:shared].tolist() == model.prompt[:shared]
            if not is_own:
                raise Violation("waits_for_its_own", f"{model.rid} waits for pages of {prefetch.namespace}")

    # ------------------------------------------------------------------------------------------------

    def _running(self) -> set[RequestKey]:
        return {(request.client, request.rid) for request in self._scheduler.running}

    def _is_in_place(self, key: RequestKey) -> bool:
        scheduler = self._scheduler
        for place in (scheduler.running, scheduler.loading, scheduler.waiting, scheduler.grammars):
            for request in place:
                if request.rid == key[1] and request.client == key[0]:
                    return True
        return False

    def _places(self) -> set[RequestKey]:
        scheduler = self._scheduler
        places = (scheduler.running, scheduler.loading, scheduler.waiting, scheduler.grammars)
        return {(request.client, request.rid) for place in places for request in place}


def _lasting_pauses(messages: list[ToEngine]) -> list[PauseGeneration]:
    """The pauses that still hold at the end of the turn's messages; earlier ones have been answered."""
    pauses: list[PauseGeneration] = []
    for message in messages:
        if isinstance(message, PauseGeneration):
            pauses.append(message)
        elif isinstance(message, ContinueGeneration):
            pauses.clear()
    return pauses


def _is_meant(rid: str, wanted: str, match: str) -> bool:
    return match == "all" or rid == wanted or (match == "prefix" and rid.startswith(wanted))
