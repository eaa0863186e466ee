"""A server with several engines in virtual time: the real fleet, real loops, and messages with delays."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headwater.client.change_call import ChangeCall
from headwater.client.errors import EngineGone
from headwater.client.fleet import Fleet
from headwater.clock import ManualClock
from headwater.messages.cache import PinGaveWay
from headwater.messages.control import FlushCache
from headwater.messages.generation import Generate, Outputs
from headwater.messages.state import EngineReady, Hello
from headwater.messages.two_phase import Change, Commit, Prepare, Prepared
from headwater.simulation.fakes.memory import FakeStagedWeights, FakeWeights
from headwater.simulation.fleet.engine import FleetEngine, FleetState

FIRST_WEIGHTS = "w0"
TURN_S = 0.02


@dataclass(slots=True)
class Place:
    """The place of one engine: its process, if one runs, and the messages in transit."""

    index: int
    engine: FleetEngine | None = None
    loads_at_s: float = 0.0  # end of loading, before which a new process reads nothing
    silent_until_s: float = 0.0
    inbound: list[tuple[float, Any]] = field(default_factory=list)  # (arrival, message), in order
    outbound: list[tuple[float, Any]] = field(default_factory=list)

    def can_turn(self, now_s: float) -> bool:
        return self.engine is not None and now_s >= max(self.silent_until_s, self.loads_at_s)


@dataclass(slots=True, eq=False)
class Asked:
    """A change requested by a caller, with its answer."""

    call: ChangeCall
    change: Change
    began_s: float
    answered_s: float | None = None
    is_abandoned: bool = False
    is_followed: bool = False  # by `FleetPromises`

    @property
    def is_reported_done(self) -> bool:
        return self.call.outcome is not None and self.call.outcome.is_decided


@dataclass(slots=True, eq=False)
class Sent:
    """A request and its result."""

    request: Generate
    engine: int
    sent_s: float
    tokens: list[int] = field(default_factory=list)
    finish: Any = None
    meta: Any = None
    is_lost: bool = False  # its engine died


class Disk:
    """Weights by path, named like the path. A path can be gone, or torn, so that each reader gets other weights."""

    def __init__(self) -> None:
        self.gone: set[str] = set()
        self.torn: set[str] = set()

    def read(self, path: str, *, reader: int) -> str | None:
        if path in self.gone or path.startswith("corrupt"):
            return None
        return f"{path} as read by {reader}" if path in self.torn else path


class DiskWeights(FakeWeights):
    """Weights read from a disk that a trainer changes."""

    def __init__(self, disk: Disk, current: str, *, reader: int) -> None:
        super().__init__(current)
        self._disk = disk
        self._reader = reader

    def stage(self, path: str, load_format: str) -> FakeStagedWeights:
        found = self._disk.read(path, reader=self._reader)
        error = f"{path} is gone or broken" if found is None else None
        return FakeStagedWeights(found or "", num_polls=self.num_polls, error=error)


class FleetServer:
    """Engines, the fleet in front of them, callers and requests. `turn` advances the clock by `TURN_S`."""

    def __init__(self, seed: int, num_engines: int) -> None:
        self.clock = ManualClock()
        self.disk = Disk()
        self.source = random.Random(seed)
        self.num_turns = 0
        self.asked: list[Asked] = []
        self.sent: dict[str, Sent] = {}
        self.max_delay_s = 0.0
        self.not_prepared: dict[str, set[int]] = {}  # by id of a change: engines that have not prepared it
        self.decided_without: list[tuple[str, set[int]]] = []  # changes decided before these engines had prepared
        self.history = [(0.0, FleetState(weights=FIRST_WEIGHTS, label="default"))]  # reported states, by time
        self._names = itertools.count()
        self.wrap_weights: Callable[[DiskWeights], FakeWeights] = lambda weights: weights
        self.fleet = Fleet(num_engines, new_call_id=self.new_name, started_with=(FIRST_WEIGHTS, "auto"))
        self.places = [Place(index) for index in range(num_engines)]
        for place in self.places:
            self.start(place.index)

    def new_name(self, kind: str = "call") -> str:
        return f"{kind}-{next(self._names)}"

    @property
    def says(self) -> FleetState | None:
        """The state that the server reports; None before the first engine has loaded."""
        desired = self.fleet.desired
        if desired is None:
            return None
        return FleetState(
            weights=desired.weights_id,
            label=desired.weight_version,
            is_paused=desired.pause is not None,
            released=desired.released,
            store="" if desired.store is None else f"memory {desired.store.url}",
            adapters=frozenset((adapter.name, adapter.adapter_id) for adapter in desired.adapters),
        )

    @property
    def is_busy(self) -> bool:
        """Whether a message, a change, a request or a restart of an engine is in progress."""
        if any(place.inbound or place.outbound for place in self.places) or not math.isinf(self.fleet.next_tick_s):
            return True
        waits = self.says is not None and not self.says.is_serving
        return not waits and any(not (sent.finish or sent.is_lost) for sent in self.sent.values())

    # --- engines ------------------------------------------------------------------------------------

    def start(self, index: int, *, load_s: float = 0.0) -> None:
        """Start a new process, like the supervisor: with the server's present weights, if they can be read."""
        place, told = self.places[index], self.fleet.weights_to_load
        weights_id = FIRST_WEIGHTS if told is None else self.disk.read(told[0], reader=index)
        if weights_id is None:
            weights_id = FIRST_WEIGHTS  # unlike a real process, it starts with wrong weights, and must not serve
        weights = DiskWeights(self.disk, weights_id, reader=index)
        weights.num_polls = self.source.randint(0, 20)
        place.engine = FleetEngine(self.clock, weights=self.wrap_weights(weights))
        place.loads_at_s = self.clock.now() + load_s
        place.inbound, place.outbound = [(0.0, Hello(call_id=self.new_name()))], []

    def kill(self, index: int) -> None:
        place = self.places[index]
        if place.engine is None:
            return
        place.engine, place.inbound, place.outbound = None, [], []
        for sent in self.sent.values():
            if sent.engine == index and sent.finish is None:
                sent.is_lost = True
        self.fleet.engine_gone(index, EngineGone(index, "killed"), self.clock.now())
        self._post()

    # --- callers ------------------------------------------------------------------------------------

    def ask(self, change: Change, *, timeout_s: float) -> Asked:
        now_s = self.clock.now()
        call = self.fleet.begin(change, deadline_s=now_s + timeout_s, now_s=now_s)
        asked = Asked(call, change, now_s)
        self.asked.append(asked)
        self._post()
        return asked

    def abandon(self, asked: Asked) -> None:
        asked.is_abandoned = True
        self.fleet.abandon(asked.call, self.clock.now())
        self._post()

    def flush(self) -> None:
        """Have all engines that serve flush everything, whatever else is in progress."""
        flush = FlushCache(call_id=self.new_name(), mode="now")
        for index in self.fleet.candidates():
            self._put(self.places[index], msgspec.structs.replace(flush, call_id=self.new_name()))
        self.fleet.flushed(flush)

    def send(self, request: Generate) -> Sent | None:
        """Send a request to one of the fleet's candidates; None if there is none."""
        offered = self.fleet.candidates()
        if not offered:
            return None
        sent = Sent(request, self.source.choice(offered), self.clock.now())
        self.sent[request.rid] = sent
        self._put(self.places[sent.engine], request)
        return sent

    # --- time ---------------------------------------------------------------------------------------

    def turn(self) -> None:
        self.num_turns += 1
        self.clock.advance(TURN_S)
        for place in self.places:
            self._turn(place)
        self.fleet.tick(self.clock.now())
        self._post()
        for asked in self.asked:
            if asked.answered_s is None and asked.call.outcome is not None:
                asked.answered_s = self.clock.now()

    def _turn(self, place: Place) -> None:
        now_s = self.clock.now()
        if place.can_turn(now_s):
            assert place.engine is not None
            while place.inbound and place.inbound[0][0] <= now_s:
                place.engine.send(place.inbound.pop(0)[1])
            place.engine.turn()
            place.outbound += [(self._arrival(place.outbound), said) for said in place.engine.take()]
        while place.outbound and place.outbound[0][0] <= now_s and place.can_turn(now_s):
            self._deliver(place.index, place.outbound.pop(0)[1])

    def _deliver(self, index: int, said: Any) -> None:
        if isinstance(said, Outputs):
            for output in said.items:
                sent = self.sent[output.rid]
                sent.tokens += output.token_ids
                sent.finish, sent.meta = output.finish, output.meta or sent.meta
        elif isinstance(said, PinGaveWay):
            self.fleet.pin_gave_way(index, said)
        elif isinstance(said, EngineReady):
            self.fleet.engine_ready(index, said, self.clock.now())
        else:
            if isinstance(said, Prepared):
                self.not_prepared.get(said.call_id, set()).discard(index)
            self.fleet.take_answer(index, said, self.clock.now())
        self._post()

    def _post(self) -> None:
        says = self.says
        if says is not None and says != self.history[-1][1]:
            self.history.append((self.clock.now(), says))
        for index, message in self.fleet.take_outbox():
            if isinstance(message, Prepare):
                self.not_prepared.setdefault(message.change.call_id, set()).add(index)
            elif isinstance(message, Commit) and (missing := self.not_prepared.pop(message.prepared, None)):
                self.decided_without.append((message.prepared, missing))
            self._put(self.places[index], message)

    def _put(self, place: Place, message: Any) -> None:
        if place.engine is not None:
            place.inbound.append((self._arrival(place.inbound), message))

    def _arrival(self, before: list[tuple[float, Any]]) -> float:
        """The arrival of a message, which may be late but never overtakes an earlier one."""
        at_s = self.clock.now() + self.source.random() * self.max_delay_s
        return max(at_s, before[-1][0]) if before else at_s
