"""How each engine stands to the desired state, and the way back of an engine that is behind."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from headwater.client.desired_state import DesiredState
from headwater.messages.adapters import LoadAdapter, UnloadAdapter
from headwater.messages.base import TimedCall
from headwater.messages.cache import AttachStorage, DetachStorage
from headwater.messages.control import (
    CancelOperation,
    ContinueGeneration,
    Failed,
    FlushCache,
    FlushResult,
    PauseGeneration,
)
from headwater.messages.state import EngineState, GetState
from headwater.messages.two_phase import InStep
from headwater.messages.weights import (
    ReleaseMemory,
    ResumeMemory,
    SetWeightVersion,
    UpdateWeights,
)

GONE = "its process has ended"
LOADING = "it is still loading its model"
RETURNING = "it is being brought to the state of the server"
_ASK_S = 5.0  # for an answer to `GetState`
_STEP_S = 60.0  # for a step that waits for nothing but the engine
_LOAD_S = 600.0  # for one that reads weights
_MAX_OWED = 16  # flushes; more of them become one of everything in memory
_LATE_S = 1.0  # after the moment at which the engine gives a step up
_RETRY_S = 10.0  # after a step that failed: files may come back


@dataclass(slots=True)
class Standing:
    """One engine. It serves only while it is known to be in the desired state."""

    index: int
    is_loaded: bool = False
    is_serving: bool = False
    is_first: bool = True  # its process has not been replaced
    has_left: bool = False  # for good
    owed: tuple[FlushCache, ...] = ()  # flushes that were answered without it; made before it serves again
    why_out: str | None = LOADING  # None: it serves
    store_revision: int = 0  # of the last change of the store that it has made
    has_pins: bool = True
    wants_pins: bool = False  # everything else is restored
    asked: str | None = None  # call id
    step: Any = None  # the message that was sent; None: `GetState`
    asked_until_s: float = 0.0
    asked_revision: int = 0  # of the desired state when it was asked
    retry_at_s: float = 0.0

    def loaded(self) -> None:
        self.is_loaded, self.is_serving, self.why_out = True, False, RETURNING
        self.asked, self.retry_at_s = None, 0.0

    def gone(self) -> None:
        """The process that replaces this one knows nothing of the desired state."""
        self.is_loaded = self.is_serving = self.is_first = self.has_pins = self.wants_pins = False
        self.why_out, self.asked, self.store_revision = GONE, None, 0
        self.owed = ()  # a new process has nothing in its memory

    def fence(self, reason: str) -> None:
        """It takes no requests until it is found to be in the desired state."""
        self.is_serving, self.why_out, self.asked, self.retry_at_s = False, reason, None, 0.0

    def owe(self, flush: FlushCache) -> None:
        """It makes this flush before it serves again, at once and under load."""
        flush = msgspec.structs.replace(flush, mode="now", hold=False, timeout_s=0.0, expires_at_s=None)
        self.owed = (*self.owed, flush)
        if len(self.owed) > _MAX_OWED:
            self.owed = (FlushCache(call_id=flush.call_id, mode="now"),)

    def confirm(self, desired: DesiredState) -> None:
        """It has made the newest change. An engine that is behind with another change stays out."""
        if self.is_serving:
            self.serve(desired)

    def serve(self, desired: DesiredState) -> None:
        self.is_serving, self.why_out, self.asked = True, None, None
        self.store_revision = desired.store_revision

    @property
    def next_look_s(self) -> float:
        if not self.is_loaded or self.is_serving or self.wants_pins:
            return math.inf
        return self.retry_at_s if self.asked is None else self.asked_until_s


@dataclass(frozen=True, slots=True)
class Stuck:
    """The desired state cannot be reached from here."""

    reason: str


class Restoring:
    """Asks an engine for its state, corrects the first difference, and asks again until none is left."""

    def __init__(self, send: Callable[[int, Any], None], new_call_id: Callable[[], str]) -> None:
        self._send = send
        self._new_call_id = new_call_id

    def advance(self, standing: Standing, desired: DesiredState, now_s: float) -> None:
        """Ask if it is time to. A step towards a state that is no longer desired is cancelled."""
        is_outdated = standing.step is not None and standing.asked_revision != desired.revision
        if standing.asked is not None and is_outdated and not standing.is_serving:
            self._send(standing.index, CancelOperation(call_id=self._new_call_id(), started_by_call=standing.asked))
            standing.asked, standing.retry_at_s = None, now_s
        if now_s < standing.next_look_s:
            return
        call_id = self._new_call_id()
        self._ask(standing, GetState(call_id=call_id, expires_at_s=now_s + _ASK_S), None, now_s + _ASK_S)

    def take_answer(self, standing: Standing, answer: Any, desired: DesiredState, now_s: float) -> None:
        """An answer from the engine; ignored unless it answers the last question."""
        if answer.call_id != standing.asked:
            return
        standing.asked, standing.retry_at_s = None, now_s
        if isinstance(answer, Failed):
            what = "" if standing.step is None else f" ({_name(standing.step)})"
            self._stop(standing, f"it could not be brought to the state of the server{what}: {answer.message}", now_s)
        elif isinstance(answer, EngineState):
            self._next_step(standing, answer, desired, now_s)
        elif isinstance(answer, FlushResult) and not answer.success:
            self._stop(standing, f"it could not make a flush that it owes: {answer.message}", now_s)
        else:
            self._carried_out(standing)

    def _next_step(self, standing: Standing, state: EngineState, desired: DesiredState, now_s: float) -> None:
        if state.num_decided:  # a late change: its result is not known yet
            standing.retry_at_s = now_s + 0.05
            return
        step = difference(standing, state, desired, call_id=self._new_call_id())
        runs = not (state.paused or state.released_memory)  # else pins can no longer be computed
        is_last = step is None or isinstance(step, PauseGeneration | ReleaseMemory | InStep)
        if not standing.has_pins and is_last and runs and desired.pins_on(standing.index, now_s=now_s):
            standing.wants_pins = True
        elif isinstance(step, Stuck):
            self._stop(standing, step.reason, now_s)
        elif step is not None:
            limit_s = _LOAD_S if isinstance(step, UpdateWeights | ResumeMemory | LoadAdapter) else _STEP_S
            step = msgspec.structs.replace(step, expires_at_s=now_s + limit_s)
            if isinstance(step, TimedCall):
                step = msgspec.structs.replace(step, timeout_s=limit_s)
            standing.asked_revision = desired.revision
            self._ask(standing, step, step, now_s + limit_s)
        else:
            standing.serve(desired)

    def _carried_out(self, standing: Standing) -> None:
        if isinstance(standing.step, AttachStorage | DetachStorage):
            standing.store_revision = standing.asked_revision
        elif isinstance(standing.step, FlushCache):
            standing.owed = standing.owed[1:]

    def _ask(self, standing: Standing, message: Any, step: Any, until_s: float) -> None:
        standing.asked, standing.step, standing.asked_until_s = message.call_id, step, until_s + _LATE_S
        self._send(standing.index, message)

    def _stop(self, standing: Standing, reason: str, now_s: float) -> None:
        standing.why_out, standing.retry_at_s = reason, now_s + _RETRY_S


def difference(standing: Standing, state: EngineState, desired: DesiredState, *, call_id: str) -> Any:
    """The message that corrects the first difference; `Stuck`; None if the engine is in the desired state."""
    if standing.owed:
        return msgspec.structs.replace(standing.owed[0], call_id=call_id)
    if standing.store_revision < desired.store_revision:
        if desired.store is None:
            return DetachStorage(call_id=call_id)
        return msgspec.structs.replace(desired.store, call_id=call_id)
    if state.weights_id != desired.weights_id:
        return _next_weights(state.weights_id, desired, call_id=call_id)
    if state.weight_version != desired.weight_version:
        return SetWeightVersion(call_id=call_id, weight_version=desired.weight_version, abort_all_requests=False)
    if (step := _next_adapter(state, desired, call_id=call_id)) is not None:
        return step
    if desired.pause is None and state.paused:
        return ContinueGeneration(call_id=call_id)
    released = frozenset(state.released_memory)
    if extra := released - desired.released:
        return ResumeMemory(call_id=call_id, tags=tuple(sorted(extra)))
    if missing := desired.released - released:
        if state.paused and state.num_running:  # frozen requests would never end
            return PauseGeneration(call_id=call_id, mode="retract")
        return ReleaseMemory(call_id=call_id, tags=tuple(sorted(missing)))
    if desired.pause is not None and not state.paused:
        return msgspec.structs.replace(desired.pause, call_id=call_id)
    return InStep(call_id=call_id) if state.is_behind else None


def _next_weights(weights_id: str, desired: DesiredState, *, call_id: str) -> UpdateWeights | Stuck:
    """The checkpoint after the last one that the engine has; the first if the engine has other weights."""
    steps = desired.weights
    known = [step.weights_id for step in steps]
    step = steps[known.index(weights_id) + 1 if weights_id in known else 0]
    if not step.path:
        return Stuck(f"it loaded other weights than the server serves: {weights_id}, not {step.weights_id}")
    label = desired.weight_version if step is steps[-1] else ""  # these weights were never served by themselves
    return UpdateWeights(
        call_id=call_id,
        path=step.path,
        load_format=step.load_format,
        weight_version=label,
        only_weights_id=step.weights_id,
        weights_id=step.weights_id if step.is_received else "",
        names=tuple(step.names),
    )


def _next_adapter(state: EngineState, desired: DesiredState, *, call_id: str) -> LoadAdapter | UnloadAdapter | None:
    """The first adapter that the engine has to unload, or to load. Unloading comes first: it makes room."""
    has = {adapter.name: adapter.adapter_id for adapter in state.adapters}
    for name in has.keys() - {adapter.name for adapter in desired.adapters}:
        return UnloadAdapter(call_id=call_id, name=name)
    for adapter in desired.adapters:
        if has.get(adapter.name) != adapter.adapter_id:
            return LoadAdapter(
                call_id=call_id,
                name=adapter.name,
                path=adapter.path,
                load_inplace=True,
                only_adapter_id=adapter.adapter_id,
            )
    return None


def _name(step: Any) -> str:
    return step.__struct_config__.tag.replace("_", " ")
