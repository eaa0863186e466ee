"""The API process's way to its engines: each request to one of them, control calls to one or all."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import zmq.asyncio

from headwater.client.engine_choice import choose_engine
from headwater.client.errors import (
    CallFailed,
    EngineGone,
    EngineLoading,
    NoSuchEngine,
    RidInUse,
    ShuttingDown,
)
from headwater.client.generation import Generation
from headwater.client.link import EngineLink, new_call_id
from headwater.client.prefix_routes import PrefixRoutes
from headwater.messages.cache import AttachStorage
from headwater.messages.control import FlushCache
from headwater.messages.generation import Generate
from headwater.messages.state import EngineReady
from headwater.messages.weights import ReleaseMemory, ResumeMemory, UpdateWeights

__all__ = [
    "CallFailed",
    "Deferred",
    "EngineClient",
    "EngineGone",
    "EngineLoading",
    "Generation",
    "NoSuchEngine",
    "RidInUse",
    "ShuttingDown",
    "new_call_id",
]

_SHORTEST_S = 1e-9  # a timeout that has run out is still one that was given

# calls with a `timeout_s` of their own
Deferred = FlushCache | UpdateWeights | ReleaseMemory | ResumeMemory | AttachStorage


class EngineClient:
    """Every request and call gets an answer: from the engine, or `EngineGone` when there is none any more.

    All methods belong to the event loop in which `start` ran.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        """`endpoints`: a zmq address for each engine, by index; the engines may bind them later."""
        if not endpoints:
            raise ValueError("endpoints must name at least one engine")
        self._endpoints = tuple(endpoints)
        self._context: zmq.asyncio.Context | None = None
        self._links: tuple[EngineLink, ...] = ()
        self._routes: PrefixRoutes | None = None  # made when several engines are there to choose from
        self._refusal: ShuttingDown | None = None

    # --- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect to every engine and say Hello. A second call does nothing."""
        if self._context is not None:
            return
        self._context = zmq.asyncio.Context()
        self._links = tuple(EngineLink(index, self._context) for index in range(len(self._endpoints)))
        for link, endpoint in zip(self._links, self._endpoints, strict=True):
            link.open(endpoint)

    async def wait_ready(self, *, timeout_s: float | None = None) -> tuple[EngineReady, ...]:
        """Wait until every engine has loaded. Raises EngineGone if one ends before, TimeoutError."""
        assert self._links, "start first"
        async with asyncio.timeout(timeout_s):
            return tuple([await link.wait_ready() for link in self._links])

    async def close(self) -> None:
        """Fail what is under way and close the sockets."""
        self.refuse_all("the server has shut down")
        await asyncio.sleep(0)  # let the reader tasks see their cancellation
        if self._context is not None:
            self._context.term()
            self._context = None

    def refuse_all(self, reason: str) -> None:
        """Shutdown: whatever runs fails with ShuttingDown at once, and nothing new is taken."""
        self.refuse_new(reason)
        for link in self._links:
            link.fail(ShuttingDown(link.index, reason))

    def refuse_new(self, reason: str) -> None:
        """Take no new generations; what runs goes on, and calls still go through."""
        self._refusal = ShuttingDown(0, reason)

    def engine_gone(self, index: int, reason: str) -> None:
        """The supervisor's word that an engine's process ended."""
        self._links[index].fail(EngineGone(index, reason))
        if self._routes is not None:
            self._routes.forget(index)

    def engine_back(self, index: int, endpoint: str) -> None:
        """The supervisor's word that an engine was started again; `wait_ready` waits for its model."""
        link = self._links[index]
        if link.gone is None:
            link.fail(EngineGone(index, "replaced by a new process"))
        link.open(endpoint)

    # --- state -------------------------------------------------------------------------------------

    @property
    def num_engines(self) -> int:
        return len(self._endpoints)

    @property
    def num_running(self) -> int:
        """Requests that the engines have not ended yet."""
        return sum(link.num_running for link in self._links)

    @property
    def ready(self) -> tuple[EngineReady | None, ...]:
        """What each engine said of itself; None while it loads or is gone."""
        return tuple(link.ready for link in self._links)

    @property
    def is_healthy(self) -> bool:
        """Every engine is there and has loaded, and this client takes requests."""
        return self._refusal is None and bool(self._links) and all(link.ready for link in self._links)

    @property
    def can_serve(self) -> bool:
        """At least one engine has loaded, and this client takes requests."""
        return self._refusal is None and any(link.ready for link in self._links)

    def why_unhealthy(self) -> str | None:
        """A sentence for people, or None when healthy."""
        if self._refusal is not None:
            return self._refusal.reason
        gone = next((link.gone for link in self._links if link.gone is not None), None)
        if gone is not None:
            return str(gone)
        return None if self.is_healthy else "the engine is still loading its model"

    def silent_for_s(self) -> float:
        """Seconds since the engine heard from least recently, of those that serve, sent anything."""
        now_s = asyncio.get_running_loop().time()
        return now_s - min((link.last_heard_s for link in self._links if link.ready), default=float("-inf"))

    # --- work --------------------------------------------------------------------------------------

    def generate(self, request: Generate, *, engine: int | None = None) -> Generation:
        """Send a request at once: to `engine`, or to the one that `_choose` finds best.

        The caller owns the generation and closes it. Raises EngineGone when no engine is there, NoSuchEngine,
        RidInUse when a running request has this rid.
        """
        if self._refusal is not None:
            raise self._refusal
        if any(link.has_running(request.rid) for link in self._links):
            raise RidInUse(request.rid)
        if engine is not None and not 0 <= engine < self.num_engines:
            raise NoSuchEngine(engine, self.num_engines)
        if self._routes is None and self.num_engines > 1:
            page_size = next((link.ready.page_size for link in self._links if link.ready), None)
            self._routes = PrefixRoutes(page_size=page_size) if page_size else None
        link = self._choose(request) if engine is None else self._links[engine]
        generation = link.generate(request)
        if self._routes is not None:
            self._routes.learn(request, link.index)
        return generation

    @contextmanager
    def together(self) -> Iterator[None]:
        """What `generate` sends inside reaches each engine in one message. No `await` may be inside."""
        with ExitStack() as held:
            for link in self._links:
                held.enter_context(link.together())
            yield

    def forget_prefixes(self) -> None:
        """The engines' caches were emptied: a known beginning is no reason any more to prefer one."""
        if self._routes is not None:
            self._routes.clear()

    async def call(self, message: Any, *, engine: int = 0, timeout_s: float | None = None) -> Any:
        """Send a message of `ToEngine` with a fresh call_id to one engine; the struct it answers.

        Cancelling (or the timeout of) a deferred call cancels it in the engine, too.
        Raises CallFailed when refused, EngineGone, TimeoutError.
        """
        if not self._links:
            raise EngineGone(engine, "not started")
        return await self._links[engine].call(message, timeout_s=timeout_s)

    async def call_all(self, message: Any, *, timeout_s: float | None = None) -> list[Any]:
        """Send a message to every engine; per engine its answer, or the exception that stands for it.

        One that is still loading is not waited for: EngineLoading.
        """

        async def call(index: int) -> Any:
            if self._links and self._links[index].is_loading:
                raise EngineLoading(index)
            return await self.call(message, engine=index, timeout_s=timeout_s)

        return await asyncio.gather(*map(call, range(self.num_engines)), return_exceptions=True)

    async def call_all_by(self, message: Deferred, *, deadline_s: float, grace_s: float) -> list[Any]:
        """Send a deferred message to every engine; per engine its answer, or the exception that stands for it.

        `deadline_s` is a time of the event loop. Every engine gets what is left until then, also one that is
        still loading and has to be waited for. The engines keep the deadline themselves; one that is silent
        for `grace_s` more has failed with TimeoutError.
        """
        calls = [
            self._call_by(message, engine=index, deadline_s=deadline_s, grace_s=grace_s)
            for index in range(self.num_engines)
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    async def _call_by(self, message: Deferred, *, engine: int, deadline_s: float, grace_s: float) -> Any:
        clock = asyncio.get_running_loop().time
        if self._links:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._links[engine].wait_ready()
            except TimeoutError:
                raise EngineLoading(engine) from None
        left_s = max(deadline_s - clock(), min(message.timeout_s, _SHORTEST_S))
        message = msgspec.structs.replace(message, timeout_s=min(left_s, message.timeout_s))
        return await self.call(message, engine=engine, timeout_s=message.timeout_s + grace_s)

    def _choose(self, request: Generate) -> EngineLink:
        """The engine that knows most of the prompt, unless it has much more to do; else the least loaded."""
        links = [link for link in self._links if link.ready] or [link for link in self._links if not link.gone]
        if not links:
            raise (self._links[0].gone if self._links else None) or EngineGone(0, "not started")
        return choose_engine(links, self._routes.known(request) if self._routes else [])
