"""The promises of control operations: which requests may run while they hold, and the meaning of their answers."""

from collections.abc import Callable

from headwater.messages.adapters import LoadAdapter
from headwater.messages.cache import AttachStorage, PinPrefix, Pins
from headwater.messages.control import ContinueGeneration, Failed, FlushCache, FlushResult, PauseGeneration
from headwater.messages.generation import Abort, Generate, GenerateBatch
from headwater.messages.state import Shutdown
from headwater.messages.weights import (
    MemoryResult,
    ReleaseMemory,
    ResumeMemory,
    SetWeightVersion,
    UpdateWeights,
    WeightsUpdated,
)
from headwater.messages.wire import ToClient, ToEngine
from headwater.simulation.checks.cuts import Cuts
from headwater.simulation.checks.oracle import Oracle
from headwater.simulation.checks.pending_calls import STORE_GRACE_S, PendingCall, PendingCalls
from headwater.simulation.checks.request_model import RequestKey, RequestModel
from headwater.simulation.checks.retirements import Retirements
from headwater.simulation.checks.service_promises import ServicePromises
from headwater.simulation.checks.violation import Violation, demand
from headwater.simulation.fakes.memory import FakeWeights
from headwater.simulation.fakes.shared_world import SharedWorld, StoreRetirement

_EXCLUSIVE = (UpdateWeights, ReleaseMemory, ResumeMemory, AttachStorage, LoadAdapter)


class ControlPromises:
    """Follows the calls of one engine, and checks each turn against them at its end."""

    def __init__(
        self,
        world: SharedWorld,
        *,
        oracle: Oracle,
        calls: PendingCalls,
        retirements: Retirements,
        cuts: Cuts,
        service: ServicePromises,
        live_pins: Callable[[], dict[str, bool]],
        weights: FakeWeights,
        phases: Callable[[], dict[str, str]],
    ) -> None:
        self.released: tuple[str, ...] = ()
        self._world = world
        self._phases = phases  # phase of each pending operation, by call id
        self._oracle = oracle
        self._calls = calls
        self._retirements = retirements
        self.is_paused = False
        self._generation = 0
        self._running_before: set[RequestKey] = set()
        self._was_released = False
        self._ended_by: list[tuple[Abort, list[RequestModel]]] = []
        self._cuts = cuts
        self._weights = weights
        self._applied_now: list[PendingCall] = []  # flushes of this turn
        self._flushes_answered: list[tuple[PendingCall, FlushResult]] = []  # of this turn
        self._service = service
        self._live_pins = live_pins  # by id: whether a flush has retired their pages
        self._pins_retired: set[str] = set()  # at the end of the last turn
        self._pins: dict[str, float] = {}  # end of each pin's time
        self._pins_due: set[str] = set()  # whose time had ended at the start of the turn
        self._messages: list[ToEngine] = []  # of this turn
        self._answers: list[tuple[PendingCall, ToClient]] = []  # of this turn
        self._num_releases = 0  # of memory in this turn
        self._immediate: list[PendingCall] = []  # flushes that take effect in the turn that reads them
        self._applied: dict[tuple[bytes, str], tuple[int, StoreRetirement | None, str | None]] = {}

    # --- before a turn ------------------------------------------------------------------------------

    def begin_turn(self, messages: list[tuple[bytes, ToEngine]]) -> None:
        """The engine is about to read `messages`, in this order."""
        turn = self._world.turn
        if self._pins:
            now_s = self._calls.now_s()
            self._pins_due = {pin_id for pin_id, until_s in self._pins.items() if now_s >= until_s}
        self._messages = [message for _, message in messages]
        self._was_released = bool(self.released)
        for client, message in messages:
            self._calls.delivered(client, message, turn=turn)
            match message:
                case Generate():
                    self._oracle.delivered(client, message)
                case GenerateBatch():
                    for request in message.items:
                        self._oracle.delivered(client, request)
                case Abort():
                    self._abort(message)
                case PauseGeneration():
                    self.is_paused = True
                case ContinueGeneration():
                    self.is_paused = False
                case SetWeightVersion():
                    self._relabel(message)
                case FlushCache() if message.mode != "idle" and not message.dry_run:
                    self._immediate.append(self._calls.pending[client, message.call_id])
                case _:
                    pass
        if not self._calls.pending:
            return
        self._running_before = self._oracle.running_keys()
        if any(_ends_all(call.message) for call in self._calls.pending.values()):
            for model in self._oracle.active.values():
                model.may_end_early |= model.is_delivered

    # --- after a turn -------------------------------------------------------------------------------

    def answered(self, call: PendingCall, answer: ToClient) -> None:
        """The client has received the answer of `call` in this turn."""
        self._answers.append((call, answer))
        call.was_refused = isinstance(answer, Failed) or (isinstance(answer, FlushResult) and not answer.success)
        match answer:
            case FlushResult():
                self._check_flush(call, answer)
            case Pins() if isinstance(call.message, PinPrefix):
                self._pins |= {pin.pin_id: self._calls.now_s() + call.message.ttl_s for pin in answer.items}
            case MemoryResult():
                self.released = answer.released
                self._num_releases += isinstance(call.message, ReleaseMemory)
            case WeightsUpdated():
                demand(answer.weights_id == call.message.path, "weights_are_in_place", answer)  # type: ignore
                self.released = tuple(tag for tag in self.released if tag != "weights")  # an update brings new ones
            case _:
                pass

    def end_turn(self, *, has_launched: bool) -> None:
        """The turn is over, and its answers have been received."""
        self._check_pins()
        if self._immediate:
            for call in self._immediate.copy():
                self._apply_if_immediate(call)
        self._apply_while_store_is_asked()
        self._cuts.end_turn(
            self._applied_now,
            self._flushes_answered,
            weights_id=self._weights.current,
            num_releases=self._num_releases,
        )
        self._service.end_turn(self._messages, self._answers)
        self._answers.clear()
        self._applied_now.clear()
        self._flushes_answered.clear()
        self._num_releases = 0
        if self._ended_by:
            for abort, models in self._ended_by:
                left = [model.rid for model in models if model.key in self._oracle.active]
                if left:
                    raise Violation("abort_ends", f"{left} go on after {abort}")
            self._ended_by.clear()
        if has_launched:
            if self.is_paused:
                raise Violation("pause_holds", "a step was launched while paused")
            if self._was_released and self.released:
                raise Violation("release_holds", "a step was launched without memory")
        if self._oracle.entered_now:
            self._check_starts()
            self._oracle.entered_now.clear()
        self._check_held()

    @property
    def is_staging(self) -> bool:
        """Whether new weights are being staged: the first exclusive call stages them, or waits for idle."""
        for call in self._calls.pending.values():
            if isinstance(call.message, _EXCLUSIVE):
                return isinstance(call.message, UpdateWeights | ResumeMemory)
        return False

    # ------------------------------------------------------------------------------------------------

    def _check_starts(self) -> None:
        """No request has started for the first time while a call holds starts."""
        started = [model.rid for model in self._oracle.entered_now if model.num_entered == 1]
        holds = [call.message for call in self._calls.pending.values() if started and _holds_starts(call.message)]
        if holds:
            raise Violation("hold_holds", f"{started} started while held by {holds[:1]}")

    def _check_held(self) -> None:
        """Requests are held by an order or a pending call that says so, and by nothing else."""
        admission = self._service.admission
        if admission.may_start:
            return
        calls = [call.message for call in self._calls.pending.values()]
        is_closed = self.is_paused or bool(self.released)
        is_read = bool(self._weights.staged) and self._weights.staged[-1].has_ended
        holding = UpdateWeights | ResumeMemory if is_read else ResumeMemory
        holds_all = is_closed or any(isinstance(message, holding) for message in calls)
        is_right = holds_all or (admission.may_run and any(_holds_starts(message) for message in calls))
        demand(is_right, "held_by_what_holds", f"{admission} though nothing holds requests; pending: {calls}")

    def _abort(self, message: Abort) -> None:
        models = [model for model in self._oracle.active.values() if model.is_delivered and _matches(message, model)]
        for model in models:
            model.may_end_early = True
        self._ended_by.append((message, models))

    def _relabel(self, message: SetWeightVersion) -> None:
        """By default, the engine does not end requests during a pause or while memory is released."""
        ends_all = message.abort_all_requests
        if ends_all is None:
            ends_all = not (self.is_paused or self.released)
        for model in self._oracle.active.values():
            model.may_end_early |= model.is_delivered and ends_all

    def _check_flush(self, call: PendingCall, answer: FlushResult) -> None:
        flush = call.message
        assert isinstance(flush, FlushCache)
        self._flushes_answered.append((call, answer))
        if not answer.success:
            is_right = answer.status == 400 and (bool(answer.blockers) or call.is_cancelled)
            demand(is_right, "refused_only_if_busy", answer)
            return
        demand(answer.dry_run == flush.dry_run, "dry_run_is_dry", answer)
        if answer.dry_run:
            return
        if flush.mode != "drain" and "storage" not in flush.tiers:  # those report an older one
            demand(answer.generation >= self._generation, "generations_grow", answer)
            self._generation = answer.generation
        self._check_pending(call, answer)
        self._apply_if_immediate(call)
        key = (call.client, flush.call_id)
        if key not in self._applied:
            self._check_was_idle()
            self._apply(call)
        turn, store, adapter = self._applied.pop(key)
        if store is not None and not answer.pending:
            store.acknowledged_turn = self._world.turn
        if flush.mode == "drain" and answer.drained and answer.status == 200:
            self._check_drained(flush, turn, adapter)

    def _check_pending(self, call: PendingCall, answer: FlushResult) -> None:
        """A flush that is answered before its end names what is not done, and gives the store its time."""
        if call.is_cancelled:
            return
        holds_pages = answer.mode == "drain" and not answer.drained
        is_over = not answer.pending and not holds_pages
        demand((answer.status == 200) == is_over, "pending_is_told", answer)
        is_early = answer.pending and not holds_pages and answer.waited_s < STORE_GRACE_S
        demand(not is_early, "pending_is_told", f"after {answer.waited_s} s: {answer}")

    def _check_pins(self) -> None:
        """A pin ends after its time, so that its pages can be evicted again."""
        if not self._pins:  # each pin is kept until its time ends, even if it ended earlier
            self._pins_retired.clear()
            return
        pins = self._live_pins()
        late, flushed = self._pins_due & pins.keys(), self._pins_retired & pins.keys()
        if late:
            raise Violation("pins_end", f"{late} are held though their time is over")
        if flushed:
            raise Violation("pins_end", f"{flushed} hold what a flush has retired")
        self._pins_retired = {pin_id for pin_id, is_retired in pins.items() if is_retired}
        for pin_id in self._pins_due:
            del self._pins[pin_id]
        self._pins_due = set()

    def _check_was_idle(self) -> None:
        """No request has been running all the time: before this turn, after it, and without a new entry."""
        entered = {model.key for model in self._oracle.entered_now}
        still = (self._running_before & self._oracle.running_keys()) - entered
        demand(not still, "idle_is_idle", f"flushed as idle while {still} ran")

    def _apply_if_immediate(self, call: PendingCall) -> None:
        """A flush that waits for nothing took effect in the turn that read it, unless it was refused."""
        if call in self._immediate:
            self._immediate.remove(call)
            if not call.was_refused:
                self._apply(call)

    def _apply_while_store_is_asked(self) -> None:
        """A flush that waited for idle has taken effect, even if its answer waits for the store."""
        if not self._calls.pending:
            return
        waiting = [
            call
            for key, call in self._calls.pending.items()
            if isinstance(call.message, FlushCache) and "storage" in call.message.tiers and key not in self._applied
        ]
        if not waiting:
            return
        phases = self._phases()
        for call in waiting:
            if phases.get(call.message.call_id) == "waiting_for_store":  # type: ignore[union-attr]
                self._apply(call)

    def _apply(self, call: PendingCall) -> None:
        flush = call.message
        assert isinstance(flush, FlushCache)
        turn = self._world.turn
        self._applied_now.append(call)
        adapter = self._cuts.adapter_cut_for(call)
        retirement = self._retirements.apply(flush, turn=turn, adapter=adapter)
        self._applied[call.client, flush.call_id] = (turn, retirement, adapter)

    def _check_drained(self, flush: FlushCache, turn: int, adapter: str | None) -> None:
        if flush.tiers and "device" not in flush.tiers:
            return
        for model, pages in self._oracle.pages_in_slots():
            is_left = self._retirements.holds_any_of(flush, pages, turn=turn, adapter=adapter)
            demand(not is_left, "drained_is_drained", f"{model.rid} holds what was flushed in turn {turn}")


def _ends_all(message: ToEngine) -> bool:
    match message:
        case PauseGeneration():
            return message.mode == "abort"
        case UpdateWeights():
            return message.abort_all_requests
        case Shutdown():
            return True
        case _:
            return False


def _holds_starts(message: ToEngine) -> bool:
    match message:
        case FlushCache():
            return message.hold and message.mode == "idle" and not message.dry_run
        case ReleaseMemory():
            return True
        case _:
            return False


def _matches(abort: Abort, model: RequestModel) -> bool:
    match abort.match:
        case "all":
            return True
        case "prefix":
            return model.rid.startswith(abort.rid)
        case _:
            return model.rid == abort.rid
