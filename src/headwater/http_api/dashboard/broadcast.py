"""One source for all viewers: it ticks while there are any, and each tick is encoded once."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from headwater.generation.errors import ApiError
from headwater.http_api.dashboard.differences import difference
from headwater.http_api.sse import event

Json = dict[str, Any]
PERIOD_S = 1.0
MAX_VIEWERS = 100
MAX_EVENTS = 10  # that a viewer has not taken; then it gets one whole snapshot instead
KEEP_ALIVE_S = 10.0
KEEP_ALIVE = b": still here\n\n"
log = logging.getLogger(__name__)


class _Viewer:
    def __init__(self) -> None:
        self.events: deque[bytes] = deque()
        self.needs_whole = True
        self.has_some = asyncio.Event()


class Broadcast:
    """Sends the snapshots that `take` makes. Nothing runs without viewers. Belongs to one event loop."""

    def __init__(
        self,
        take: Callable[[], Awaitable[Json]],
        *,
        more: Callable[[], Json] = dict,
        has_ended: Callable[[], bool] = lambda: False,
        period_s: float = PERIOD_S,
    ) -> None:
        """`more`: what a new viewer gets besides its first snapshot. `has_ended`: whether the server shuts down."""
        self._take = take
        self._more = more
        self._has_ended = has_ended
        self._period_s = period_s
        self._viewers: set[_Viewer] = set()
        self._source: asyncio.Task[None] | None = None
        self._snapshot: Json | None = None  # the newest, while there are viewers
        self._is_over = False

    @property
    def num_viewers(self) -> int:
        return len(self._viewers)

    async def watch(self) -> AsyncGenerator[bytes]:
        """Server-sent events: `whole` first, then `patch` with the differences. ApiError if there are too many."""
        if len(self._viewers) >= MAX_VIEWERS:
            raise ApiError(503, f"{MAX_VIEWERS} pages are open already", code="too_many_viewers")
        viewer = _Viewer()
        self._viewers.add(viewer)
        if self._source is None:
            self._source = asyncio.ensure_future(self._run())
        elif self._snapshot is not None:
            viewer.has_some.set()
        try:
            while not self._is_over:
                yield await self._next(viewer)
        finally:
            self._viewers.discard(viewer)
            if not self._viewers and self._source is not None:
                self._source.cancel()
                self._source = self._snapshot = None

    async def _next(self, viewer: _Viewer) -> bytes:
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                await viewer.has_some.wait()
        except TimeoutError:
            return KEEP_ALIVE
        if viewer.needs_whole and self._snapshot is not None:
            viewer.needs_whole = False
            viewer.events.clear()
            viewer.has_some.clear()
            return event({"snapshot": self._snapshot} | self._more(), name="whole")
        found = b"".join(viewer.events) or KEEP_ALIVE
        viewer.events.clear()
        viewer.has_some.clear()
        return found

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while not self._has_ended():
            try:
                self._publish(await self._take())
            except Exception:
                log.exception("a snapshot for the operating page failed")
            due_s = max(due_s + self._period_s, loop.time())  # after a slow one, no hurry
            await asyncio.sleep(due_s - loop.time())
        self._is_over = True
        for viewer in self._viewers:
            viewer.has_some.set()

    def _publish(self, snapshot: Json) -> None:
        patch = event(difference(self._snapshot or {}, snapshot), name="patch")
        self._snapshot = snapshot
        for viewer in self._viewers:
            if len(viewer.events) >= MAX_EVENTS:
                viewer.needs_whole = True
            if viewer.needs_whole:
                viewer.events.clear()
            else:
                viewer.events.append(patch)
            viewer.has_some.set()
