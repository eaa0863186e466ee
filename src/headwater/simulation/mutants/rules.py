"""Mutants of single rules of scheduling, control and pins: a comparison, a field or a step that is slightly wrong."""

from dataclasses import replace
from typing import Any

from msgspec import structs

from headwater.cache.pins import Pin, PinBoard
from headwater.control.control_plane import ControlPlane
from headwater.control.controlled_engine import ControlledEngine
from headwater.control.flush import Flush
from headwater.control.memory import MemoryRelease
from headwater.control.operation import Hold
from headwater.control.weights import WeightUpdate
from headwater.messages.generation import Generate
from headwater.scheduling import outputs
from headwater.scheduling.outputs import OutputBuffer
from headwater.scheduling.plan_builder import PlanBuilder
from headwater.scheduling.request import Request
from headwater.scheduling.scheduler import Scheduler
from headwater.scheduling.step_filler import StepFiller
from headwater.simulation.mutants.registry import Patch, mutant

# --- scheduling -------------------------------------------------------------------------------------


@mutant()
def chunks_sample_before_the_prompt_ends() -> list[Patch]:
    """Every chunk of a prompt samples a token."""
    right = PlanBuilder.add_chunk

    def add_chunk(self: PlanBuilder, request: Request, num_tokens: int, *, samples: bool) -> None:
        right(self, request, num_tokens, samples=request.max_new_tokens > 0)

    return [(PlanBuilder, "add_chunk", add_chunk)]


@mutant()
def answers_are_one_token_longer() -> list[Patch]:
    """A request ends one token late."""
    right = Scheduler._add

    def add(self: Scheduler, request: Request, sampling: Any) -> None:
        right(self, request, structs.replace(sampling, max_new_tokens=sampling.max_new_tokens + 1))

    return [(Scheduler, "_add", add)]


@mutant()
def answers_are_not_cut_to_the_context() -> list[Patch]:
    """A request may ask for more tokens than the context holds."""
    right = Scheduler._add

    def add(self: Scheduler, request: Request, sampling: Any) -> None:
        right(self, request, sampling)
        request.max_new_tokens = sampling.max_new_tokens

    return [(Scheduler, "_add", add)]


@mutant()
def stop_tokens_count_one_too_early() -> list[Patch]:
    """The last of `min_new_tokens` may end the answer."""

    def is_stop_token(self: Request, token_id: int) -> bool:
        return token_id in self.stop_token_ids and self.num_outputs >= self.sampling.min_new_tokens

    return [(Request, "is_stop_token", is_stop_token)]


@mutant()
def eos_ends_those_that_ignore_it() -> list[Patch]:
    """`ignore_eos` is ignored."""
    right = Scheduler._add

    def add(self: Scheduler, request: Request, sampling: Any) -> None:
        right(self, request, structs.replace(sampling, ignore_eos=False))

    return [(Scheduler, "_add", add)]


@mutant()
def held_back_tokens_are_lost_at_the_end() -> list[Patch]:
    """The last output of a request omits the tokens that its interval kept back."""
    right = OutputBuffer.finish

    def finish(self: OutputBuffer, request: Request, finish: Any, meta: Any) -> None:
        outputs._take_unsent(request)
        right(self, request, finish, meta)

    return [(OutputBuffer, "finish", finish)]


@mutant(seed=1)
def aborts_by_name_take_all_that_begin_with_it() -> list[Patch]:
    """An abort of one request ends all requests whose names begin with its name."""
    right = Scheduler.abort

    def abort(self: Scheduler, rid: str, *, match: str, message: str) -> int:
        return right(self, rid, match="prefix" if match == "exact" else match, message=message)

    return [(Scheduler, "abort", abort)]


@mutant()
def aborts_by_prefix_take_one() -> list[Patch]:
    """An abort by prefix ends only the request of exactly that name."""
    right = Scheduler.abort

    def abort(self: Scheduler, rid: str, *, match: str, message: str) -> int:
        return right(self, rid, match="exact" if match == "prefix" else match, message=message)

    return [(Scheduler, "abort", abort)]


@mutant(profile="flush")
def short_prompts_overtake() -> list[Patch]:
    """Smaller requests overtake a prompt that waits for pages, forever."""
    right = Scheduler._admit

    def admit(self: Scheduler, builder: PlanBuilder) -> None:
        waiting = list(self.waiting)
        fits = [r for r in waiting if len(r.tokens) <= 2 * self.cache.page_size]
        long = [r for r in waiting if r not in fits]
        if fits:
            for request in long:
                self.waiting.remove(request)
        right(self, builder)
        if fits:
            for request in long:
                self.waiting.add(request)

    return [(Scheduler, "_admit", admit)]


@mutant(seed=1)
def retracted_requests_go_to_the_end() -> list[Patch]:
    """A retracted request is queued behind later arrivals."""
    right = Scheduler._retract

    def retract(self: Scheduler, request: Request) -> None:
        right(self, request)
        self.waiting.remove(request)
        priority, arrival = request.queue_key
        request.queue_key = (priority, arrival + 1_000_000)
        self.waiting.add(request)

    return [(Scheduler, "_retract", retract)]


@mutant()
def the_oldest_gives_way() -> list[Patch]:
    """If pages run out, the oldest request loses its pages."""

    def has_page(self: StepFiller, request: Request) -> bool:
        if self._running.has_page_for_next_token(request):
            return True
        while not self._running.extend(request):
            if self._running.awaits_pages:
                return False
            victim = min(self._running, key=lambda r: r.queue_key)
            self._retract(victim)
            if victim is request:
                return False
        return True

    return [(StepFiller, "_has_page_for_next_token", has_page)]


@mutant(seed=15)
def prompts_are_reported_again_after_a_retraction() -> list[Patch]:
    """Log-probabilities of a prompt that is computed twice are kept twice."""
    right = Scheduler._retract

    def retract(self: Scheduler, request: Request) -> None:
        known = list(request.unsent.prompt_logprobs)
        right(self, request)
        request.unsent.prompt_logprobs = known

    return [(Scheduler, "_retract", retract)]


@mutant(profile="training")
def weights_versions_are_not_noted() -> list[Patch]:
    """An answer that two weights computed names only the first."""
    right = Scheduler.begin_weights

    def begin_weights(self: Scheduler, weights_id: str, *, end_ids: tuple[int, ...] = ()) -> None:
        known = {request: list(request.weights_versions) for request in self._requests.values()}
        right(self, weights_id, end_ids=end_ids)
        for request, versions in known.items():
            request.weights_versions = versions

    return [(Scheduler, "begin_weights", begin_weights)]


@mutant()
def priorities_are_not_taken_in() -> list[Patch]:
    """A request's priority is ignored."""
    right = Request.__init__

    def init(self: Request, message: Generate, **kwargs: Any) -> None:
        right(self, structs.replace(message, options=structs.replace(message.options, priority=0)), **kwargs)

    return [(Request, "__init__", init)]


# --- control ----------------------------------------------------------------------------------------


@mutant(profile="flush")
def flushes_now_wait_for_idle() -> list[Patch]:
    """A flush of mode `now` or `drain` also waits for an idle moment."""
    right = Flush.look

    def look(self: Flush, moment: Any) -> Any:
        if self._retirement is None and not self._message.dry_run and moment.blockers:
            return self._still_busy(moment)
        return right(self, moment)

    return [(Flush, "look", look)]


@mutant(profile="flush")
def dry_runs_flush() -> list[Patch]:
    """A dry run carries out the flush."""

    def preview(self: Flush, moment: Any) -> Any:
        return self._flushed(moment, self._engine.cache.retire(self.scope()))

    return [(Flush, "_preview", preview)]


@mutant(profile="flush")
def still_warm_is_left_out() -> list[Patch]:
    """A flush does not report which tiers it left warm."""
    right = Flush._flushed

    def flushed(self: Flush, *args: Any, **kwargs: Any) -> Any:
        return structs.replace(right(self, *args, **kwargs), still_warm=())

    return [(Flush, "_flushed", flushed)]


@mutant(profile="flush")
def blockers_are_left_out_of_refusals() -> list[Patch]:
    """A refused flush does not report its blockers."""
    right = Flush._refused

    def refused(self: Flush, *args: Any, **kwargs: Any) -> Any:
        return structs.replace(right(self, *args, **kwargs), blockers={})

    return [(Flush, "_refused", refused)]


@mutant(profile="training")
def holds_outlast_their_operation() -> list[Patch]:
    """A hold never ends."""
    right: Any = ControlPlane.hold

    def hold(self: ControlPlane) -> Hold:
        most = max(right.fget(self), getattr(self, "_most", Hold.NOTHING))
        self._most = most  # type: ignore[attr-defined]
        return most

    return [(ControlPlane, "hold", property(hold))]


@mutant(profile="training")
def updates_end_requests_unasked() -> list[Patch]:
    """A weight update always ends all requests."""
    right = WeightUpdate.__init__

    def init(self: WeightUpdate, message: Any, *rest: Any) -> None:
        right(self, structs.replace(message, abort_all_requests=True), *rest)

    return [(WeightUpdate, "__init__", init)]


@mutant(profile="training")
def labels_are_not_changed_by_updates() -> list[Patch]:
    """New weights serve under the old label."""
    right = WeightUpdate._swap

    def swap(self: WeightUpdate, *args: Any) -> Any:
        self._message = structs.replace(self._message, weight_version=None)
        return right(self, *args)

    return [(WeightUpdate, "_swap", swap)]


@mutant(profile="training")
def retract_ends_requests() -> list[Patch]:
    """A pause that should retract requests ends them."""

    def retract_all(self: Scheduler) -> int:
        return self.abort("", match="all", message="Aborted: generation was paused")

    return [(Scheduler, "retract_all", retract_all)]


@mutant(profile="training", seed=24)
def memory_is_released_under_a_step() -> list[Patch]:
    """Memory is released while a step of ended requests still computes."""
    right = MemoryRelease.__init__

    def init(self: MemoryRelease, message: Any, engine: ControlledEngine, *rest: Any) -> None:
        right(self, message, replace(engine, is_step_in_flight=lambda: False), *rest)

    return [(MemoryRelease, "__init__", init)]


# --- the loop and pins ------------------------------------------------------------------------------


@mutant()
def pins_never_end() -> list[Patch]:
    """A pin stays after its time."""

    def advance(self: PinBoard) -> None:
        for pin in list(self._pins.values()):
            if pin.is_retired:
                self.unpin(pin.pin_id)
            elif pin.hold is not None and pin.lease is not None and not pin.hold.is_complete:
                self._hold_more(pin)

    return [(PinBoard, "advance", advance)]


@mutant()
def pins_outlive_a_flush() -> list[Patch]:
    """A pin keeps retired pages, and a drain waits for them forever."""
    return [(Pin, "is_retired", property(lambda self: False))]
