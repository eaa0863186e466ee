"""The engine's loop: all state of the engine process changes in `turn`, in a fixed order."""

import logging
from collections import deque
from collections.abc import Callable

from msgspec import structs

from headwater.cache.page_pool import OwnershipError
from headwater.cache.storage.names import StorageNames
from headwater.clock import Clock
from headwater.control.control_plane import ControlPlane
from headwater.control.operation import Hold
from headwater.control.pinning import Pinning
from headwater.engine.cache_view import CacheTreeView
from headwater.engine.kv_events_publisher import KvEventsPublisher
from headwater.engine.snapshot import Snapshots
from headwater.engine.steps import Steps
from headwater.engine.wire import Wire
from headwater.messages.base import Call, is_expired
from headwater.messages.cache import CacheTree, GetCacheTree
from headwater.messages.control import Done, Failed
from headwater.messages.generation import Abort, Generate, GenerateBatch
from headwater.messages.snapshot import GetMapNode, GetSnapshot
from headwater.messages.state import EngineReady, EngineState, GetState, Hello, Ping, Shutdown
from headwater.messages.two_phase import Prepare
from headwater.messages.wire import ToEngine
from headwater.scheduling.answers import first_line
from headwater.scheduling.limits import Admission
from headwater.scheduling.scheduler import Scheduler

_LONGEST_SLEEP_S = 1.0
_log = logging.getLogger(__name__)
_ADMISSIONS = {hold: Admission(may_run=hold < Hold.ALL, may_start=hold < Hold.STARTS) for hold in Hold}
_IDLE_S = 2.0  # a server has begun to answer by then, if it is asked at once
_POLL_S = 0.001  # while copies are in flight or grammars are compiled: their ends send no message


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
        steps: Steps,
        ready: EngineReady,
        report: Callable[[str], EngineState],
        snapshots: Snapshots,
        pinning: Pinning,
        clock: Clock,
        names: StorageNames,
        kv_events: KvEventsPublisher | None = None,
    ) -> None:
        self._wire = wire
        self._clock = clock
        self._scheduler = scheduler
        self._control = control
        self._ready = ready  # call_id is filled in for each client
        self._report = report
        self._snapshots = snapshots
        self._pinning = pinning
        self._names = names  # of the cache's blocks
        self._kv_events = kv_events
        self._steps = steps
        self._has_progressed = False  # in the last turn: then the next may find something to run
        self._clients: set[bytes] = set()  # that have said Hello: all get notices
        self._is_stopping = False
        self._at_end: list[Callable[[], None]] = []
        self._when_idle: Callable[[], None] | None = None
        self._busy_at_s = clock.now()  # kept only while something is to be called when idle
        self._after_all: list[Callable[[], None]] = []
        self._checks: list[Callable[[], None]] = []

    def call_at_end(self, close: Callable[[], None], *, also_after_error: bool = False) -> None:
        """Have `close` called when `run` ends, in the order given: it frees what the engine was built on.

        `also_after_error`: whatever ended `run`, and after the others.
        """
        (self._after_all if also_after_error else self._at_end).append(close)

    def call_each_turn(self, check: Callable[[], None]) -> None:
        """Have `check` called in each turn. It raises if the engine cannot go on, and `run` ends with that."""
        self._checks.append(check)

    def call_when_idle(self, call: Callable[[], None]) -> None:
        """Have `run` call this once, when nothing has run for two seconds. It must return at once."""
        self._when_idle = call

    def run(self) -> None:
        """Turn until a `Shutdown` message or `stop()`; running requests are aborted.

        Closes the wire: a loop runs once.
        """
        try:
            self._run()
        finally:
            for close in self._after_all:
                close()

    def _run(self) -> None:
        while not self._is_stopping:
            self.turn()
            if self._when_idle is not None:
                self._call_if_idle(self._when_idle)
        self._steps.collect()
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
            self._take(message, client)
        for check in self._checks:
            check()
        has_copied = self._scheduler.cache.apply_finished()  # completions only, also while paused or idle
        self._scheduler.take_compiled()
        self._pinning.advance()
        self._scheduler.end_overdue()
        self._scheduler.admission = self._admission()
        self._control.advance()
        self._scheduler.admission = self._admission()  # an operation that ended may have opened it
        if self._control.has_answers:  # not after the step that is computed meanwhile
            self._send_outputs()
        plan = self._scheduler.plan_step()
        launched = (plan, self._steps.launch(plan)) if plan else None
        self._has_progressed = has_copied or launched is not None or self._steps.uncollected is not None
        self._steps.collect()  # on a GPU this overlaps with the step just launched
        if launched is not None:
            launched = (launched[0], self._steps.choose(*launched))  # grammars need the tokens just collected
        self._steps.uncollected = launched
        if launched is not None and self._steps.is_done(launched[1]):  # on a CPU the result leaves in the same turn
            self._steps.collect()
        self._send_outputs()

    def _call_if_idle(self, call: Callable[[], None]) -> None:
        if self._has_progressed or self._steps.uncollected is not None:
            self._busy_at_s = self._clock.now()
        elif self._clock.now() - self._busy_at_s >= _IDLE_S:
            self._when_idle = None
            call()

    def _admission(self) -> Admission:
        return _ADMISSIONS[self._control.hold]

    def _longest_useful_wait_s(self) -> float:
        if self._has_progressed or self._steps.uncollected is not None:
            return 0.0
        needs_polling = self._scheduler.cache.lower.needs_polling or self._scheduler.grammars.needs_polling
        longest_s = _POLL_S if needs_polling else _LONGEST_SLEEP_S
        longest_s = min(longest_s, self._scheduler.deadlines.next_look_s())
        look_s = self._control.pending.next_look_s()
        return longest_s if look_s is None else min(look_s, longest_s)

    def prepare_grammars(self) -> None:
        """Begin to read what the first grammar would wait for."""
        if (compiler := self._scheduler.grammars.compiler) is not None:
            compiler.prepare()

    @property
    def survived(self) -> deque[Exception]:
        """The newest errors after which the loop went on."""
        return self._steps.survived

    def _send_outputs(self) -> None:
        if self._kv_events is not None:  # before the answers: a client that knows of a flush can have seen its events
            self._kv_events.publish()
        for client, outputs in self._scheduler.take_outputs():
            self._wire.send(client, outputs)
        for client, answer in self._control.take_answers():
            self._wire.send(client, answer)
        for notice in self._pinning.take_notices():
            for client in self._clients:
                self._wire.send(client, notice)

    def _take_tree(self, message: GetCacheTree) -> CacheTree | Failed:
        adapter_id = None if message.lora_name is None else self._scheduler.adapters.id_of(message.lora_name)
        if message.lora_name and adapter_id is None:
            text = f"no adapter {message.lora_name!r} is loaded"
            return Failed(call_id=message.call_id, status=404, message=text, param="lora_path")
        view = CacheTreeView(
            self._scheduler.cache, message, names=self._names, events=self._kv_events, adapter_id=adapter_id
        )
        return view.take()

    def _take(self, message: ToEngine, client: bytes) -> None:
        """Dispatch a message. One that makes its own handling fail is answered with that, and ends nothing else."""
        try:
            self._dispatch(message, client)
        except OwnershipError:  # the books are wrong
            raise
        except Exception as error:  # noqa: BLE001  a message must not end the engine
            _log.exception("a message of type %s failed", type(message).__name__)
            self.survived.append(error)
            if not isinstance(message, Generate | GenerateBatch):  # those answer by themselves
                text = f"the engine failed while it handled this call: {first_line(error)}"
                self._wire.send(client, Failed(call_id=_call_id(message), status=500, message=text))

    def _dispatch(self, message: ToEngine, client: bytes) -> None:
        if isinstance(message, Call) and is_expired(message, self._clock.now()):
            text = "the engine read the call after its deadline; nothing was done"
            self._wire.send(client, Failed(call_id=_call_id(message), status=504, message=text))
            return
        match message:
            case Generate():
                self._scheduler.add(message, client=client)
            case GenerateBatch():
                for request in message.items:
                    self._take(request, client)
            case Abort():
                self._scheduler.abort(message.rid, match=message.match, message=message.message)
                self._wire.send(client, Done(call_id=message.call_id))
            case GetCacheTree():
                self._wire.send(client, self._take_tree(message))
            case GetState():
                self._wire.send(client, self._report(message.call_id))
            case GetSnapshot():
                self._wire.send(client, self._snapshots.take(message))
            case GetMapNode():
                self._wire.send(client, self._snapshots.path(message))
            case Ping():
                self._wire.send(client, Done(call_id=message.call_id))
            case Hello():
                self._clients.add(client)
                self._wire.send(client, structs.replace(self._ready, call_id=message.call_id))
            case Shutdown():
                self._wire.send(client, Done(call_id=message.call_id))
                self.stop()
            case _:
                self._control.handle(message, client)


def _call_id(message: Call) -> str:
    """What the answer to `message` goes under."""
    return message.change.call_id if isinstance(message, Prepare) else message.call_id
