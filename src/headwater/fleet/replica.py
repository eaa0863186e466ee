"""One replica as the front knows it: what it announces, how to reach it, what runs there."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headwater.client.errors import EngineOut
from headwater.messages.base import Call
from headwater.messages.state import EngineReady
from headwater.messages.two_phase import Prepare
from headwater.messages.wire import decode_to_client, encode


class FromFront(msgspec.Struct, frozen=True, kw_only=True):
    """What a front answers to a beat: the replica repeats it in the next one."""

    front: str
    desired: str


Post = Callable[[str, bytes, dict[str, str]], Awaitable[tuple[int, bytes, float]]]  # -> status, body, its clock

UNREACHABLE = "it cannot be reached"


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica says of itself every second."""

    name: str  # never used again: a process that replaces it has another one
    url: str
    admin_key: str
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
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)

    @property
    def index(self) -> int:
        return self.number

    async def send(self, message: Call) -> Any:
        """The engine's answer, `Failed` included. Raises Unreachable."""
        headers = {"authorization": f"Bearer {self.beat.admin_key}", "content-type": "application/msgpack"}
        body = encode(self.clock.translate(message))
        try:
            status, answer, their_s = await self.post(f"{self.beat.url}/control/messages", body, headers)
        except OSError as error:
            raise Unreachable(self.number, str(error)) from None
        if status != 200:
            raise Unreachable(self.number, f"status {status}")
        self.heard_s = asyncio.get_running_loop().time()
        self.clock.heard(their_s, self.heard_s)
        return decode_to_client(answer)
