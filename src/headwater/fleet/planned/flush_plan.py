"""Flushes of a large fleet in virtual time: when they are answered, what stays pending, and whether a page is stale.

The front is the real one: `FleetClient` with its fences, watch and restorations. Messages are lost, replicas are
killed or stand still while a flush is under way, and once the front itself is replaced right after its answer.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from headwater.fleet.client import FleetClient
from headwater.fleet.planned.stand_in import StandIn, Steps
from headwater.fleet.planned.virtual_loop import VirtualLoop
from headwater.fleet.replica import Replica
from headwater.generation.errors import ApiError
from headwater.http_api.control.flush_answer import FlushAnswer
from headwater.http_api.engine_answers import EngineAnswers
from headwater.messages.control import FlushCache, FlushResult

TICK_S = 0.02
_BEAT_S = 1.0  # as replicas announce themselves
_REQUESTS_PER_TICK = 0.02  # for each replica: one a second
_CONFIRM_S = (0.5, 3.0)  # until Ray says that a process has ended
_LOAD_S = (5.0, 15.0)
_STOP_S = (0.5, 20.0)  # how long a replica stands still
_BETWEEN_S = (3.0, 6.0)  # flushes


@dataclass(frozen=True, slots=True)
class FlushTrial:
    """One fleet and its troubles."""

    num_replicas: int
    steps: Steps
    timeout_s: float
    loss: float  # of all messages and answers
    faults: float  # share of the replicas that are killed or stand still around each flush
    num_flushes: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.loss < 1 and 0 <= self.faults < 1):
            raise ValueError(f"loss and faults must be from 0 to below 1, found {self.loss:g} and {self.faults:g}")
        if self.num_replicas < 1 or self.num_flushes < 1 or self.timeout_s <= 0:
            raise ValueError("replicas and flushes must be at least 1, timeouts above 0")


@dataclass(slots=True)
class FlushFigures:
    """Lists in the order of the flushes."""

    answered_s: list[float] = field(default_factory=list)  # from call to answer
    statuses: Counter[int] = field(default_factory=Counter)
    num_pending: list[int] = field(default_factory=list)  # replicas, in each answer
    back_s: list[float] = field(default_factory=list)  # from an answer to a pending replica's serving, or its end
    num_requests: int = 0
    num_stale: int = 0  # requests that matched a page which an answered flush was to retire


def play_flushes(trial: FlushTrial, *, on_flush: Callable[[], None] | None = None) -> FlushFigures:
    """Run one trial. The same seed gives the same figures."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_FlushRun(trial).play(on_flush))


class _FlushRun:
    def __init__(self, trial: FlushTrial) -> None:
        self.figures = FlushFigures()
        self._trial = trial
        self._source = random.Random(trial.seed)
        self._replicas: dict[str, StandIn] = {}  # by name, dead ones too
        self._alive: list[StandIn] = []
        self._promised_s = 0.0  # nothing of before this moment may be matched: when the last answered flush began
        self._waiting: dict[str, float] = {}  # pending replicas, and since when
        self._confirmed_s: dict[str, float] = {}  # when Ray says that it has ended
        self._front = self._new_front()

    async def play(self, on_flush: Callable[[], None] | None) -> FlushFigures:
        for _ in range(self._trial.num_replicas):
            self._start(load_s=0.0)
        ticking = asyncio.get_running_loop().create_task(self._tick())
        try:
            await asyncio.sleep(12.0)  # all are found, and compute pages
            for number in range(self._trial.num_flushes):
                await self._flush()
                if number == self._trial.num_flushes // 2:
                    await self._replace_front()
                await asyncio.sleep(self._source.uniform(*_BETWEEN_S))
                if on_flush is not None:
                    on_flush()
            await asyncio.sleep(_STOP_S[1])  # pending replicas come back
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
        await self._front.close()
        return self.figures

    # --- the flush ----------------------------------------------------------------------------------

    async def _flush(self) -> None:
        trial, began_s = self._trial, _now_s()
        for replica in self._source.sample(self._alive, round(trial.faults * len(self._alive))):
            self._later(self._source.uniform(0.0, min(trial.timeout_s, 1.0)), self._fault, replica)
        await asyncio.sleep(self._source.uniform(0.0, 0.5))
        began_s = _now_s()
        flush = FlushCache(call_id=f"flush-{began_s}", mode="now", timeout_s=trial.timeout_s)
        deadline_s = began_s + trial.timeout_s
        answers = await self._front.call_all_by(flush, deadline_s=deadline_s, answer_by_s=deadline_s)
        if any(isinstance(answer, FlushResult) and answer.success for answer in answers):
            self._front.flushed(flush)
        try:
            facts = FlushAnswer(EngineAnswers(answers))
            status, entries = facts.status, facts.as_json()["engines"]
        except ApiError as error:
            status, entries = error.status, []
        if status in (200, 202):
            self._promised_s = began_s
        pending = [entry["dp_rank"] for entry in entries if entry.get("pending") is True]
        self.figures.answered_s.append(_now_s() - began_s)
        self.figures.statuses[status] += 1
        self.figures.num_pending.append(len(pending))
        for number in pending:
            if (replica := self._front.replicas.get(number)) is not None:
                self._waiting.setdefault(replica.beat.name, _now_s())
            else:
                self.figures.back_s.append(0.0)

    def _fault(self, replica: StandIn) -> None:
        if self._source.random() < 0.5:
            replica.stop(self._source.uniform(*_STOP_S))
            return
        replica.kill()
        self._alive.remove(replica)
        self._confirmed_s[replica.beat.name] = _now_s() + self._source.uniform(*_CONFIRM_S)
        self._later(1.0, self._start, self._source.uniform(*_LOAD_S))

    def _start(self, load_s: float) -> None:
        """A process in the place of one that has ended, or one of the first."""
        name, trial = f"replica-{len(self._replicas)}", self._trial
        replica = StandIn(name, steps=trial.steps, loss=trial.loss, source=self._source, load_s=load_s)
        self._replicas[name] = replica
        self._alive.append(replica)

    # --- the front ----------------------------------------------------------------------------------

    def _new_front(self) -> FleetClient:
        return FleetClient(self._post, is_dead=self._is_dead, started_with=("w", "auto"))

    async def _replace_front(self) -> None:
        """Another process takes its place, which knows nothing of what it has answered."""
        await self._front.close()
        self._front = self._new_front()

    async def _post(self, url: str, body: bytes, _: dict[str, str]) -> tuple[int, bytes, float]:
        return await self._replicas[url.removesuffix("/control/messages")].post(body)

    async def _is_dead(self, name: str) -> bool:
        return _now_s() >= self._confirmed_s.get(name, float("inf"))

    # --- beats and requests -------------------------------------------------------------------------

    async def _tick(self) -> None:
        per_beat, count = round(_BEAT_S / TICK_S), 0
        while True:
            count += 1
            for replica in self._alive[count % per_beat :: per_beat]:
                if replica.can_beat:
                    said = self._front.take_beat(replica.beat)
                    replica.beat = msgspec.structs.replace(replica.beat, front=said.front, desired=said.desired)
            self._look_at_pending()
            candidates = self._front.candidates()
            for _ in range(min(len(candidates), round(_REQUESTS_PER_TICK * self._trial.num_replicas) or 1)):
                chosen = self._source.choice(candidates)
                on_end = partial(self._request_ended, chosen)
                self._replicas[chosen.beat.name].serve(since_s=self._promised_s, on_end=on_end)
            await asyncio.sleep(TICK_S)

    def _request_ended(self, chosen: Replica, is_stale: bool | None) -> None:
        if is_stale is None:
            self._front.suspect(chosen)
            return
        self.figures.num_requests += 1
        self.figures.num_stale += is_stale

    def _look_at_pending(self) -> None:
        if not self._waiting:
            return
        numbers = {replica.beat.name: number for number, replica in self._front.replicas.items()}
        for name, since_s in list(self._waiting.items()):
            number = numbers.get(name)
            has_ended = number is None and self._replicas[name].is_dead
            if has_ended or (number is not None and self._front.why_out(number) is None):
                self.figures.back_s.append(_now_s() - since_s)
                del self._waiting[name]

    def _later(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        asyncio.get_running_loop().call_later(seconds, call, *args)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
