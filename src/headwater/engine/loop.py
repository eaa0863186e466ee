"""The engine's loop: all state of the engine process changes in `turn`, in a fixed order."""

from collections.abc import Callable
from typing import assert_never

from msgspec import structs

from headwater.clock import Clock
from headwater.control.control_plane import ControlPlane
from headwater.control.operation import Hold
from headwater.engine.cache_view import CacheTreeView
from headwater.engine.flight import Flight
from headwater.engine.kv_events_publisher import KvEventsPublisher
from headwater.engine.pinning import Pinning
from headwater.engine.ports import ModelRunner
from headwater.engine.wire import Wire
from headwater.messages.base import Call, is_expired
from headwater.messages.cache import (
    AttachStorage,
    DetachStorage,
    GetCacheTree,
    GetPins,
    GetStorage,
    PinPrefix,
    UnpinPrefix,
)
from headwater.messages.control import (
    CancelOperation,
    ContinueGeneration,
    Done,
    Failed,
    FlushCache,
    GetOperations,
    Operations,
    PauseGeneration,
)
from headwater.messages.generation import Abort, Generate, GenerateBatch
from headwater.messages.state import EngineReady, EngineState, GetState, Hello, Ping, Shutdown
from headwater.messages.two_phase import Commit, Prepare
from headwater.messages.weights import GetWeights, ReleaseMemory, ResumeMemory, SetWeightVersion, UpdateWeights
from headwater.messages.wire import ToEngine
from headwater.scheduling.scheduler import Admission, Scheduler

_LONGEST_SLEEP_S = 1.0
_POLL_S = 0.001  # while copies are in flight: their ends send no message


class EngineLoop:
    """Messages in, steps launched and collected, answers out.

    Tests and the simulation call `turn` themselves; a server calls `run`.
    """

    def __init__(
        self,
        *,
        wire: Wire,
        scheduler: Scheduler,
        control: ControlPlane,
        runner: ModelRunner,
        ready: EngineReady,
        flight: Flight,
        report: Callable[[str], EngineState],
        pinning: Pinning,
        clock: Clock,
        kv_events: KvEventsPublisher | None = None,
    ) -> None:
        self._wire = wire
        self._clock = clock
        self._scheduler = scheduler
        self._control = control
        self._runner = runner
        self._ready = ready  # call_id is filled in for each client
        self._report = report
        self._pinning = pinning
        self._kv_events = kv_events
        self._flight = flight
        self._has_progressed = False  # in the last turn: then the next may find something to run
        self._is_stopping = False
        self._at_end: list[Callable[[], None]] = []

    def call_at_end(self, close: Callable[[], None]) -> None:
        """Have `close` called when `run` ends, in the order given: what the engine was built on gives back."""
        self._at_end.append(close)

    def run(self) -> None:
        """Turn until a `Shutdown` message or `stop()`; running requests are aborted, their clients told.

        Closes the wire: a loop runs once.
        """
        while not self._is_stopping:
            self.turn()
        self._finish_previous_step()
        self._scheduler.abort("", match="all", message="the server is shutting down")
        self._send_outputs()
        if self._kv_events is not None:
            self._kv_events.close()
        self._wire.close()
        for close in self._at_end:
            close()

    def stop(self) -> None:
        """Make `run` return after its current turn. May be called from a signal handler or another thread."""
        self._is_stopping = True

    def turn(self) -> None:
        """One turn. A sleeping loop wakes for messages and deadlines; it sleeps only if nothing can run."""
        for client, message in self._wire.receive(wait_s=self._longest_useful_wait_s()):
            self._dispatch(message, client)
        has_copied = self._scheduler.cache.apply_finished()  # completions only, also while paused or idle
        self._pinning.advance()
        self._scheduler.admission = self._admission()
        self._control.advance()
        self._scheduler.admission = self._admission()  # an operation that ended may have opened it
        if self._control.has_answers:  # not after the step that is computed meanwhile
            self._send_outputs()
        plan = self._scheduler.plan_step()
        launched = (plan, self._runner.launch(plan)) if plan else None
        self._has_progressed = has_copied or launched is not None or self._flight.step is not None
        self._finish_previous_step()  # on a GPU this overlaps with the step just launched
        self._flight.step = launched
        if launched is not None and launched[1].is_done():  # on a CPU the result leaves in the same turn
            self._finish_previous_step()
        self._send_outputs()

    def _admission(self) -> Admission:
        hold = self._control.hold
        return Admission(may_run=hold < Hold.ALL, may_start=hold < Hold.STARTS)

    def _longest_useful_wait_s(self) -> float:
        if self._has_progressed or self._flight.step is not None:
            return 0.0
        longest_s = _POLL_S if self._scheduler.cache.needs_polling else _LONGEST_SLEEP_S
        look_s = self._control.next_look_s()
        return longest_s if look_s is None else min(look_s, longest_s)

    def _finish_previous_step(self) -> None:
        if self._flight.step is None:
            return
        plan, handle = self._flight.step
        self._flight.step = None
        self._scheduler.collect(plan, handle.collect())

    def _send_outputs(self) -> None:
        if self._kv_events is not None:  # before the answers: who has been told of a flush can have seen its events
            self._kv_events.publish()
        for client, outputs in self._scheduler.take_outputs():
            self._wire.send(client, outputs)
        for client, answer in self._control.take_answers():
            self._wire.send(client, answer)

    def _dispatch(self, message: ToEngine, client: bytes) -> None:
        if isinstance(message, Call) and is_expired(message, self._clock.now()):
            text = "the engine read the call after its deadline; nothing was done"
            call_id = message.change.call_id if isinstance(message, Prepare) else message.call_id
            self._wire.send(client, Failed(call_id=call_id, status=504, message=text))
            return
        match message:
            case Generate():
                self._scheduler.add(message, client=client)
            case GenerateBatch():
                for request in message.items:
                    self._scheduler.add(request, client=client)
            case Abort():
                self._scheduler.abort(message.rid, match=message.match, message=message.message)
                self._wire.send(client, Done(call_id=message.call_id))
            case FlushCache():
                self._control.flush(message, client)
            case PauseGeneration():
                self._control.pause(message, client)
            case ContinueGeneration():
                self._control.resume(message, client)
            case UpdateWeights():
                self._control.update_weights(message, client)
            case SetWeightVersion():
                self._control.set_weight_version(message, client)
            case GetWeights():
                self._control.get_weights(message, client)
            case ReleaseMemory():
                self._control.release_memory(message, client)
            case ResumeMemory():
                self._control.resume_memory(message, client)
            case AttachStorage():
                self._control.attach_storage(message, client)
            case DetachStorage():
                self._control.detach_storage(message, client)
            case GetStorage():
                self._control.get_storage(message, client)
            case PinPrefix() | UnpinPrefix() | GetPins():
                self._wire.send(client, self._pinning.answer(message))
            case GetCacheTree():
                self._wire.send(client, CacheTreeView(self._scheduler.cache, message).take())
            case Prepare():
                self._control.prepare(message, client)
            case Commit():
                self._control.commit(message, client)
            case CancelOperation():
                self._control.cancel(message, client)
            case GetOperations():
                items = self._control.operations()
                self._wire.send(client, Operations(call_id=message.call_id, items=items))
            case GetState():
                self._wire.send(client, self._report(message.call_id))
            case Ping():
                self._wire.send(client, Done(call_id=message.call_id))
            case Hello():
                self._wire.send(client, structs.replace(self._ready, call_id=message.call_id))
            case Shutdown():
                self._wire.send(client, Done(call_id=message.call_id))
                self.stop()
            case _:
                assert_never(message)
