"""Plays a workload against one server: open loop by its arrivals, or closed loop with some sessions at a time."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from headwater.bench.apis import Api, Settings
from headwater.bench.arrivals import Session, due_s
from headwater.bench.connection import HttpClient
from headwater.bench.conversation import Conversation, PromptWriter
from headwater.bench.exchange import Exchange, Watched, exchange

PREPARED_BYTES = 64 << 20  # of requests that are written before the start; later ones are written when they are due


class Target(NamedTuple):
    """A server under load."""

    name: str
    http: HttpClient
    control: HttpClient  # with the key for flushes
    api: Api
    settings: Settings
    timeout_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How sessions begin.

    With `is_open`, at their times, and `num_at_once` limits how many run; the time that a session waits for this limit
    counts as latency. Otherwise `num_at_once` sessions run all the time, each as soon as another one has ended.
    """

    is_open: bool
    num_at_once: int | None = None


async def play(
    target: Target, sessions: Sequence[Session], *, writer: PromptWriter, pace: Pace, watched: Watched
) -> list[Exchange]:
    """Send all requests. Returns what became of each, in the order of their ends."""
    done: list[Exchange] = []
    plays = list(_prepared(target, sessions, writer))
    began_s = time.perf_counter()
    slots = asyncio.Semaphore(pace.num_at_once or len(sessions))

    async def in_slot(each: _SessionPlay) -> None:
        async with slots:
            await each.run(began_s, is_open=True, watched=watched, done=done)

    async def in_turns(waiting: Iterator[_SessionPlay]) -> None:
        for each in waiting:
            await each.run(time.perf_counter(), is_open=False, watched=watched, done=done)

    async with asyncio.TaskGroup() as tasks:
        if pace.is_open:
            for each in plays:
                await _sleep_until(began_s + each.session.begins_s)
                tasks.create_task(in_slot(each))
        else:
            waiting = iter(plays)
            for _ in range(min(pace.num_at_once or 1, len(plays))):
                tasks.create_task(in_turns(waiting))
    return done


class _SessionPlay:
    """One session: its turns one after the other. Its first request may be written in advance."""

    def __init__(self, target: Target, session: Session, writer: PromptWriter) -> None:
        self.session = session
        self._target = target
        self._conversation = Conversation(writer)
        self._first: bytes | None = None

    def prepare(self) -> int:
        """Write the first request. Returns its bytes."""
        self._first = self._body(0)
        return len(self._first)

    def _body(self, turn: int) -> bytes:
        numbered = self.session.turns[turn]
        settings = self._target.settings
        if numbered.request.cache_salt:
            settings = replace(settings, extra=settings.extra | {"cache_salt": numbered.request.cache_salt})
        prompt = self._conversation.prompt(numbered.request, numbered.number)
        return self._target.api.body(prompt, max(1, numbered.request.num_output_tokens), settings)

    async def run(self, began_s: float, *, is_open: bool, watched: Watched, done: list[Exchange]) -> None:
        """Ends at the first turn that fails: the following ones would have another prompt than planned."""
        for turn in range(len(self.session.turns)):
            previous_s = time.perf_counter() - began_s
            at_s = began_s + due_s(self.session, turn, previous_ended_s=previous_s) if is_open else time.perf_counter()
            if not is_open and turn:
                at_s += self.session.turns[turn].request.think_s
            body, self._first = self._first, None
            if body is None:
                body = self._body(turn)
            await _sleep_until(at_s)
            target = self._target
            result = await exchange(
                target.http, target.api, body, due_s=at_s, timeout_s=target.timeout_s, watched=watched
            )
            done.append(result)
            if result.error:
                return
            self._conversation.answered(result.told)


def _prepared(target: Target, sessions: Sequence[Session], writer: PromptWriter) -> Iterator[_SessionPlay]:
    num_bytes = 0
    for session in sessions:
        each = _SessionPlay(target, session, writer)
        if num_bytes < PREPARED_BYTES:
            num_bytes += each.prepare()
        yield each


async def _sleep_until(at_s: float) -> None:
    left_s = at_s - time.perf_counter()
    if left_s > 0:
        await asyncio.sleep(left_s)
