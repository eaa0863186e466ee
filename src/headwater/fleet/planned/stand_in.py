"""A stand-in for a replica: it answers the front as an engine does, and keeps nothing but the age of its pages."""

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from headwater.fleet.replica import Beat
from headwater.messages.base import is_expired
from headwater.messages.control import Done, Failed, FlushCache, FlushResult
from headwater.messages.state import EngineReady, EngineState, GetState, Hello
from headwater.messages.two_phase import answered_under
from headwater.messages.wire import decode_to_engine, encode

GIVEN_UP_S = 15.0  # a connection whose messages are lost is given up by then
_TRAVEL_S = 0.002  # mean, of a message between two hosts

_READY = EngineReady(
    call_id="", model_name="planned", architecture="", dtype="", vocab_size=1, max_context=1, eos_token_ids=(),
    page_size=16, num_pages=1, page_bytes=1, max_running=1, weights_id="w", weight_version="v", load_s=0.0, device="",
)  # fmt: skip
_STATE = EngineState(
    call_id="", num_running=0, num_waiting=0, num_retracted=0, num_paused=0, paused=False, blockers={}, tiers={},
    generation=0, weights_id="w", weight_version="v", page_size=16, gen_throughput=0.0, uptime_s=0.0, counters={},
    max_running=1, max_total_tokens=1, memory_bytes={},
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a loaded engine: it reads messages between two of them."""

    decode_s: float
    prefill_s: float  # with a chunk of a prompt beside the decodes
    prefill_share: float = 0.1  # of all steps

    def left_s(self, source: random.Random) -> float:
        """What is left of the step that runs at a random moment."""
        weight = self.prefill_share * self.prefill_s
        is_prefill = source.random() * (weight + (1 - self.prefill_share) * self.decode_s) < weight
        return source.random() * (self.prefill_s if is_prefill else self.decode_s)


class StandIn:
    """One process of a replica. Requests that reach it compute a page, or match the one that is there."""

    def __init__(self, name: str, *, steps: Steps, loss: float, source: random.Random, load_s: float = 0.0) -> None:
        self.beat = Beat(name=name, url=name, admin_key="")
        self.died_s = math.inf
        self.page_s: float | None = None  # when the oldest page in its cache was computed
        self._steps = steps
        self._loss = loss
        self._source = source
        self._ahead_s = source.uniform(-1e5, 1e5)  # of its host's clock
        self._loads_at_s = _now_s() + load_s
        self._stopped_until_s = 0.0
        self._under_way: set[asyncio.Task[Any]] = set()

    @property
    def is_dead(self) -> bool:
        return self.died_s <= _now_s()

    @property
    def can_beat(self) -> bool:
        return not self.is_dead and _now_s() >= self._stopped_until_s and self._source.random() >= self._loss

    def kill(self) -> None:
        self.died_s = _now_s()

    def stop(self, seconds: float) -> None:
        """It stands still, and reads later what comes meanwhile. Its pages stay."""
        self._stopped_until_s = _now_s() + seconds

    def serve(self, *, since_s: float, on_end: Callable[[bool | None], None]) -> None:
        """A request. `on_end`: whether it matched a page of before `since_s`; None: it did not come through."""
        loop = asyncio.get_running_loop()

        def arrive() -> None:
            if self._stopped_until_s > loop.time() and not self.is_dead:
                loop.call_at(self._stopped_until_s, arrive)
            elif self.is_dead or loop.time() < self._loads_at_s:
                on_end(None)
            else:
                self.page_s = loop.time() if self.page_s is None else self.page_s
                on_end(self.page_s < since_s)

        if self._source.random() < self._loss:
            loop.call_later(GIVEN_UP_S, on_end, None)
        else:
            loop.call_later(self._travel_s() + self._steps.left_s(self._source), arrive)

    async def post(self, body: bytes) -> tuple[int, bytes, float]:
        """A message of the front; it arrives also if the front stops waiting. Raises OSError."""
        task = asyncio.get_running_loop().create_task(self._deliver(body))
        self._under_way.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # the front may have left

    async def _deliver(self, body: bytes) -> tuple[int, bytes, float]:
        await self._carry(self._travel_s() + self._steps.left_s(self._source))
        while (left_s := self._stopped_until_s - _now_s()) > 0 and not self.is_dead:  # noqa: ASYNC110
            await asyncio.sleep(min(left_s, 0.1))
        if self.is_dead or _now_s() < self._loads_at_s:
            raise ConnectionRefusedError("nothing listens there")
        answer, answered_s = self._answer(decode_to_engine(body)), _now_s() + self._ahead_s
        await self._carry(self._travel_s())
        if self.is_dead:
            raise ConnectionResetError("the connection was closed")
        return 200, encode(answer), answered_s

    async def _carry(self, seconds: float) -> None:
        """A message or an answer takes `seconds`, or is lost."""
        if self._source.random() < self._loss:
            await asyncio.sleep(GIVEN_UP_S)
            raise ConnectionResetError("a message was lost")
        await asyncio.sleep(seconds)

    def _travel_s(self) -> float:
        return self._source.expovariate(1 / _TRAVEL_S)

    def _answer(self, message: Any) -> Any:
        call_id = answered_under(message)
        if is_expired(message, _now_s() + self._ahead_s):
            return Failed(call_id=call_id, status=504, message="it came too late")
        if isinstance(message, FlushCache):
            self.page_s = None
            text = "flushed"
            return FlushResult(call_id=call_id, status=200, success=True, message=text, mode=message.mode, waited_s=0.0)
        if isinstance(message, Hello | GetState):
            return msgspec.structs.replace(_READY if isinstance(message, Hello) else _STATE, call_id=call_id)
        return Done(call_id=call_id)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
