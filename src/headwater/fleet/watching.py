"""Replicas that come and go: greets new ones, and notices those that no longer answer."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from headwater.client.errors import EngineGone
from headwater.client.fleet_driver import FleetDriver
from headwater.client.link import new_call_id
from headwater.fleet.replica import UNREACHABLE, Replica, Unreachable
from headwater.messages.control import Failed
from headwater.messages.state import EngineReady, EngineState, GetState, Hello, Ping

IsDead = Callable[[str], Awaitable[bool]]

LOOK_S = 1.0  # from one look to the next
ANSWER_S = 5.0  # an engine answers between two steps
LOST_S = 15.0  # of silence: then requests without an answer go to another replica
log = logging.getLogger(__name__)


class Watching:
    """One task for each replica. A replica that cannot be reached is fenced; one that has ended for good leaves."""

    def __init__(
        self, replicas: dict[int, Replica], driver: FleetDriver, *, is_dead: IsDead, on_leave: Callable[[int], None]
    ) -> None:
        self._replicas = replicas
        self._driver = driver
        self._is_dead = is_dead
        self._on_leave = on_leave
        self._wake: dict[int, asyncio.Event] = {}

    def begin(self, replica: Replica) -> None:
        self._wake[replica.number] = asyncio.Event()
        task = asyncio.get_running_loop().create_task(self._watch(replica))
        task.add_done_callback(_report)
        replica.tasks.append(task)

    def leave(self, replica: Replica, reason: str) -> None:
        """It has ended for good."""
        self._replicas.pop(replica.number, None)
        self._wake.pop(replica.number, None)
        replica.leave()
        self._driver.leave(replica.number, reason)
        self._on_leave(replica.number)
        for task in replica.tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def look_now(self, replica: Replica) -> None:
        if (wake := self._wake.get(replica.number)) is not None:
            wake.set()

    async def _watch(self, replica: Replica) -> None:
        while replica.number in self._replicas:
            await self._look(replica)
            wake = self._wake.get(replica.number)
            if wake is None:
                return
            try:
                async with asyncio.timeout(LOOK_S):
                    await wake.wait()
            except TimeoutError:
                pass
            wake.clear()

    async def _look(self, replica: Replica) -> None:
        until_s = asyncio.get_running_loop().time() + ANSWER_S
        try:
            if replica.ready is None:
                await self._greet(replica, until_s=until_s)
            else:
                await replica.ask(Ping(call_id=new_call_id()), until_s=until_s)
        except EngineGone:
            return  # it has left meanwhile
        except (Unreachable, TimeoutError) as error:
            await self._not_reached(replica, error)
            return
        if not replica.is_reachable:
            replica.is_reachable = True
            self._driver.can_be_reached(replica.number)

    async def _greet(self, replica: Replica, *, until_s: float) -> None:
        """Its engine has loaded: it serves, or is brought to the state of the fleet first."""
        ready = await replica.ask(Hello(call_id=new_call_id()), until_s=until_s)
        state = await replica.ask(GetState(call_id=new_call_id()), until_s=until_s)
        if not isinstance(ready, EngineReady) or not isinstance(state, EngineState):
            text = ready.message if isinstance(ready, Failed) else "its engine does not say how it is"
            raise Unreachable(replica.number, text)
        replica.ready = msgspec.structs.replace(
            ready, weights_id=state.weights_id, weight_version=state.weight_version
        )  # `ready` names the weights that it started with
        self._driver.engine_ready(replica.number, replica.ready)

    async def _not_reached(self, replica: Replica, error: Exception) -> None:
        reason = str(error) if isinstance(error, Unreachable) else f"{UNREACHABLE}: no answer in {ANSWER_S:.0f} s"
        if replica.is_reachable and replica.ready is not None:
            log.warning("replica %d takes no requests: %s", replica.number, reason)
            self._driver.fence(replica.number, reason)
        replica.is_reachable = False
        if asyncio.get_running_loop().time() - replica.heard_s > LOST_S:
            replica.lose()
        if await self._is_dead(replica.beat.name):
            log.warning("replica %d has ended", replica.number)
            self.leave(replica, "its process has ended")


def _report(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("the watch over a replica ended", exc_info=task.exception())
