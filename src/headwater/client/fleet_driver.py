"""Gives a `Fleet` the parts that it does not know: the event loop's time and timers, sockets, and computed pins."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from headwater.client.change_call import ChangeCall, Outcome
from headwater.client.desired_state import DesiredPin, DesiredState
from headwater.client.errors import EngineGone
from headwater.client.fleet import Fleet
from headwater.messages.control import FlushCache
from headwater.messages.state import EngineReady
from headwater.messages.two_phase import Change


class FleetDriver:
    """All methods belong to one running event loop."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        post: Callable[[int, Any], None],
        set_pin: Callable[[int, DesiredPin], Awaitable[None]],
    ) -> None:
        """`post` sends a message to an engine; `set_pin` has an engine compute and pin a prefix, and never raises."""
        self.fleet = fleet
        self._post = post
        self._set_pin = set_pin
        self._waiting: dict[ChangeCall, asyncio.Future[Outcome]] = {}
        self._setting_pins: dict[int, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._staged_in_use: frozenset[str] = frozenset()
        self.on_staged_in_use: Callable[[], None] = lambda: None  # other staging folders are in use than before

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._setting_pins.values():
            task.cancel()
        await asyncio.gather(*self._setting_pins.values(), return_exceptions=True)

    async def change(self, change: Change, *, deadline_s: float, engines: Sequence[int] | None) -> Outcome:
        """See `EngineClient.change`."""
        loop = asyncio.get_running_loop()
        call = self.fleet.begin(change, deadline_s=deadline_s, now_s=loop.time(), engines=engines)
        future = self._waiting[call] = loop.create_future()
        self._pump()
        try:
            return await future
        except asyncio.CancelledError:
            self.fleet.abandon(call, loop.time())
            raise
        finally:
            self._waiting.pop(call, None)
            self._pump()

    def engine_ready(self, engine: int, ready: EngineReady) -> None:
        self.fleet.engine_ready(engine, ready, asyncio.get_running_loop().time())
        self._pump()

    def engine_gone(self, error: EngineGone) -> None:
        self.fleet.engine_gone(error.engine, error, asyncio.get_running_loop().time())
        self._pump()

    def take_answer(self, engine: int, answer: Any) -> None:
        """An answer that no caller waits for."""
        self.fleet.take_answer(engine, answer, asyncio.get_running_loop().time())
        self._pump()

    def fence(self, engine: int, reason: str, *, owes: FlushCache | None = None) -> None:
        """See `Fleet.fence`."""
        self.fleet.fence(engine, reason, asyncio.get_running_loop().time(), owes=owes)
        self._pump()

    def adopt(self, desired: DesiredState) -> None:
        self.fleet.adopt(desired, asyncio.get_running_loop().time())
        self._pump()

    def can_be_reached(self, engine: int) -> None:
        self.fleet.can_be_reached(engine, asyncio.get_running_loop().time())
        self._pump()

    def leave(self, engine: int, reason: str) -> None:
        self.fleet.leave(engine, reason, asyncio.get_running_loop().time())
        self._pump()

    def _tick(self) -> None:
        self._timer = None
        self.fleet.tick(asyncio.get_running_loop().time())
        self._pump()

    def _pump(self) -> None:
        """Send the fleet's messages, resolve the changes that have ended, and set the timer for the next tick."""
        loop = asyncio.get_running_loop()
        for engine, message in self.fleet.take_outbox():
            self._post(engine, message)
        for call, future in self._waiting.items():
            if call.outcome is not None and not future.done():
                future.set_result(call.outcome)
        for standing in self.fleet.standings:
            pins = self.fleet.pins_to_set(standing.index, now_s=loop.time())
            task = self._setting_pins.get(standing.index)
            if pins and (task is None or task.done()):
                self._setting_pins[standing.index] = loop.create_task(self._set_pins(standing.index, pins))
        if (in_use := self.fleet.staged_in_use) != self._staged_in_use:
            self._staged_in_use = in_use
            self.on_staged_in_use()
        if self._timer is not None:
            self._timer.cancel()
        due_s = self.fleet.next_tick_s
        self._timer = None if math.isinf(due_s) else loop.call_at(due_s, self._tick)

    async def _set_pins(self, engine: int, pins: list[DesiredPin]) -> None:
        """A restarted engine computes and sets its pins again."""
        for pin in pins:
            await self._set_pin(engine, pin)
        self.fleet.pins_are_set(engine, now_s=asyncio.get_running_loop().time())
        self._setting_pins.pop(engine, None)
        self._pump()
