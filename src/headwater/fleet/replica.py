"""One replica as the front knows it: what it announces, how to reach it, what runs there."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headwater.client.errors import EngineGone, EngineOut
from headwater.fleet.carrying import CannotCarry, Carrying, Destination, Post
from headwater.messages.base import Call
from headwater.messages.state import EngineReady
from headwater.messages.two_phase import Prepare
from headwater.messages.wire import decode_to_client, encode


class FromFront(msgspec.Struct, frozen=True, kw_only=True):
    """What a front answers to a beat: the replica repeats it in the next one."""

    front: str
    desired: str


UNREACHABLE = "it cannot be reached"
LEFT = "it has left the fleet"
_FIRST_REPEAT_S = (0.1, 1.0)  # the least and the most that an answer is waited for before the call is sent again
_MAX_OPEN = 3  # of the same call: beyond that, the replica is silent
_MAX_REFUSALS = 3  # connections one after another, before the replica counts as not there


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica says of itself every second."""

    name: str  # never used again: a process that replaces it has another one
    url: str
    admin_key: str
    model: str = ""  # of a fleet with several models
    desired: str = ""  # the state of the fleet, as its front said it last: for the front that comes after it
    front: str = ""  # the front that it has served for; empty: none yet, so its cache is empty
    is_draining: bool = False  # it ends when its running requests have ended
    has_ended: bool = False
    pid: int = 0
    node: str = ""


class Unreachable(EngineOut):
    """The replica's server cannot be reached. HTTP 503."""

    def __init__(self, number: int, cause: str = "") -> None:
        super().__init__(number, f"{UNREACHABLE}{': ' if cause else ''}{cause}")


class ClockOffset:
    """How far a replica's monotonic clock is ahead of ours, never overestimated.

    So a deadline translated to its clock comes there at the moment that it has here, or earlier by the time that an
    answer travels. Only the newest answers count, since clocks drift.
    """

    def __init__(self, *, kept: int = 30) -> None:
        self._lower_bounds: deque[float] = deque(maxlen=kept)

    def heard(self, their_s: float, our_s: float) -> None:
        """`their_s` was read before `our_s`."""
        self._lower_bounds.append(their_s - our_s)

    def theirs(self, our_s: float | None) -> float | None:
        if our_s is None or not self._lower_bounds:
            return our_s
        return our_s + max(self._lower_bounds)

    def translate(self, message: Call) -> Call:
        """The message with its moments on the replica's clock."""
        message = msgspec.structs.replace(message, expires_at_s=self.theirs(message.expires_at_s))
        if isinstance(message, Prepare):
            change = message.change
            change = msgspec.structs.replace(change, expires_at_s=self.theirs(change.expires_at_s))
            message = msgspec.structs.replace(message, change=change)
        return message


@dataclass(slots=True, eq=False)
class Replica:
    """Belongs to one event loop."""

    number: int
    beat: Beat
    post: Post
    clock: ClockOffset = field(default_factory=ClockOffset)
    ready: EngineReady | None = None
    is_reachable: bool = True
    num_running: int = 0
    heard_s: float = float("-inf")  # loop time of its last answer
    has_left: bool = False  # for good
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    carrying: Carrying | None = None  # None: it reads the front's files
    _until_left: set[asyncio.Timeout] = field(default_factory=set)
    _until_lost: set[asyncio.Timeout] = field(default_factory=set)

    @property
    def index(self) -> int:
        return self.number

    def lose(self) -> None:
        """It has been silent for long: what has had no answer from it gets none."""
        _end(self._until_lost)

    def leave(self) -> None:
        """It has ended: nothing comes from it any more, whatever its connections look like."""
        self.has_left = True
        self.lose()
        _end(self._until_left)

    @asynccontextmanager
    async def while_there(self, *, begins: bool = False, until_s: float | None = None) -> AsyncIterator[None]:
        """TimeoutError inside when it has left, and at `until_s`; with `begins` also when it is lost."""
        scopes = self._until_lost if begins else self._until_left
        async with asyncio.timeout_at(until_s) as scope:
            scopes.add(scope)
            try:
                if self.has_left:
                    scope.reschedule(asyncio.get_running_loop().time())
                yield
            finally:
                scopes.discard(scope)

    async def ask(self, message: Call, *, until_s: float | None) -> Any:
        """As `send`, until `until_s`: sent again if no answer comes. A replica makes a call once (`RelayedCalls`).

        Raises Unreachable, EngineGone when it has left, TimeoutError.
        """
        clock = asyncio.get_running_loop().time
        least_s, wait_s = _FIRST_REPEAT_S
        if until_s is not None:
            wait_s = min(wait_s, max(least_s, (until_s - clock()) / 5))
        attempts: set[asyncio.Task[Any]] = set()
        num_refused = 0
        try:
            async with self.while_there(until_s=until_s):
                while True:
                    if len(attempts) < _MAX_OPEN:
                        attempts.add(asyncio.ensure_future(self.send(message)))
                    done, attempts = await asyncio.wait(attempts, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                    refusals = [task for task in done if task.exception() is not None]
                    if len(refusals) < len(done):
                        return next(task.result() for task in done if task not in refusals)
                    num_refused += len(refusals)
                    if num_refused >= _MAX_REFUSALS and refusals and not attempts:
                        refusals[0].result()  # raises
                    if refusals:
                        await asyncio.sleep(least_s * num_refused)
                    else:
                        wait_s *= 2
        except TimeoutError:
            if self.has_left:
                raise EngineGone(self.number, LEFT) from None
            raise
        finally:
            for task in attempts:
                task.cancel()

    async def send(self, message: Call) -> Any:
        """The engine's answer, `Failed` included. Raises Unreachable."""
        headers = {"authorization": f"Bearer {self.beat.admin_key}", "content-type": "application/msgpack"}
        try:
            if self.carrying is not None:
                to = Destination(self.beat.url, self.beat.admin_key, self.post)
                message = await self.carrying.with_own_path(message, to)
            body = encode(self.clock.translate(message))
            status, answer, their_s = await self.post(f"{self.beat.url}/control/messages", body, headers)
            if status != 200:
                raise Unreachable(self.number, f"status {status}")
            found = decode_to_client(answer)
        except CannotCarry as error:
            return error.answer_to(message)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise Unreachable(self.number, str(error)) from None  # another program may listen there now
        self.heard_s = asyncio.get_running_loop().time()
        self.clock.heard(their_s, self.heard_s)
        return found


def _end(scopes: set[asyncio.Timeout]) -> None:
    now_s = asyncio.get_running_loop().time()
    for scope in scopes:
        if not scope.expired():
            scope.reschedule(now_s)
