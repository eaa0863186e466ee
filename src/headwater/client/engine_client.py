"""The API process's way to its engines: each request to one of them, control calls to one or all."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import zmq

from headwater.client.change_call import Outcome
from headwater.client.errors import (
    CallFailed,
    EngineGone,
    EngineLoading,
    EngineOut,
    NoSuchEngine,
    RidInUse,
    ShuttingDown,
)
from headwater.client.fleet import Fleet
from headwater.client.fleet_driver import FleetDriver
from headwater.client.generation import Generation
from headwater.client.link import EngineLink, new_call_id
from headwater.client.pin_restoring import set_pin
from headwater.client.relayed_calls import RelayedCalls
from headwater.client.request_router import RequestRouter
from headwater.messages.base import Call
from headwater.messages.control import FlushCache
from headwater.messages.generation import Generate
from headwater.messages.state import EngineReady, Hello
from headwater.messages.two_phase import Change

__all__ = [
    "CallFailed",
    "EngineClient",
    "EngineGone",
    "EngineLoading",
    "Generation",
    "NoSuchEngine",
    "RidInUse",
    "ShuttingDown",
    "new_call_id",
]

_SHORTEST_S = 1e-9  # a timeout that has run out is still a timeout, unlike 0


class EngineClient:
    """Every request and call gets an answer: from the engine, or `EngineGone` when there is none any more.

    All methods belong to the event loop in which `start` ran.
    """

    def __init__(self, endpoints: Sequence[str], *, started_with: tuple[str, str] = ("", "auto")) -> None:
        """`endpoints`: a zmq address for each engine, by index; the engines may bind them later.

        `started_with`: path and format of the weights of the command line.
        """
        if not endpoints:
            raise ValueError("endpoints must name at least one engine")
        self._endpoints = tuple(endpoints)
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._refusal: ShuttingDown | None = None
        self._fleet = Fleet(len(endpoints), new_call_id=new_call_id, started_with=started_with)
        self._driver = FleetDriver(
            self._fleet,
            post=lambda engine, message: self._links[engine].post(message),
            set_pin=lambda engine, pin: set_pin(self._links[engine], pin),
        )
        self._links = tuple(
            EngineLink(
                index,
                on_ready=self._driver.engine_ready,
                on_answer=self._driver.take_answer,
                on_pin_gave_way=self._fleet.pin_gave_way,
            )
            for index in range(len(endpoints))
        )
        self._router = RequestRouter(self._links, self._fleet)
        self._relayed = RelayedCalls(self._links[0].relay)

    # --- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect to every engine and say Hello. A second call does nothing."""
        if self._context is not None:
            return
        self._context = zmq.Context()
        for link, endpoint in zip(self._links, self._endpoints, strict=True):
            link.open(endpoint, self._context)

    async def wait_ready(self, *, timeout_s: float | None = None) -> tuple[EngineReady, ...]:
        """Wait until every engine has loaded. Raises EngineGone if one ends before, TimeoutError."""
        assert self._context is not None, "start first"
        async with asyncio.timeout(timeout_s):
            return tuple([await link.wait_ready() for link in self._links])

    async def close(self) -> None:
        """Fail all requests and calls, and close the sockets."""
        self.refuse_all("the server has shut down")
        await self._driver.close()
        if self._context is not None:
            self._context.term()
            self._context = None

    def refuse_all(self, reason: str) -> None:
        """Shutdown: all requests and calls fail with ShuttingDown at once, and no new ones are taken."""
        self.refuse_new(reason)
        for link in self._links:
            self._fail(link, ShuttingDown(link.index, reason))

    def refuse_new(self, reason: str) -> None:
        """Take no new generations; running ones go on, and calls still go through."""
        self._refusal = ShuttingDown(0, reason)

    def engine_gone(self, index: int, reason: str) -> None:
        """The supervisor reports that the process of an engine has ended."""
        self._fail(self._links[index], EngineGone(index, reason))
        self._router.forget(index)

    def engine_back(self, index: int, endpoint: str) -> None:
        """The supervisor reports that an engine was started again; `wait_ready` waits for its model."""
        link = self._links[index]
        if link.gone is None:
            self._fail(link, EngineGone(index, "replaced by a new process"))
        assert self._context is not None, "start first"
        link.open(endpoint, self._context)

    # --- state -------------------------------------------------------------------------------------

    @property
    def num_engines(self) -> int:
        return len(self._endpoints)

    @property
    def engine_numbers(self) -> Sequence[int]:
        """The numbers by which calls name engines."""
        return range(self.num_engines)

    @property
    def num_running(self) -> int:
        """Requests that the engines have not ended yet."""
        return sum(link.num_running for link in self._links)

    @property
    def ready(self) -> tuple[EngineReady | None, ...]:
        """The facts that each engine reported after loading; None while it loads or is gone."""
        return tuple(link.ready for link in self._links)

    @property
    def can_serve(self) -> bool:
        """At least one engine serves, and this client takes requests."""
        return self._refusal is None and bool(self._fleet.candidates())

    @property
    def engines_out(self) -> dict[int, str]:
        """Engines that take no requests now, and why."""
        return {link.index: why for link in self._links if (why := self._router.why_out(link)) is not None}

    def adapters(self) -> dict[str, str]:
        """The path of each LoRA adapter that is loaded now, by name."""
        return self._fleet.adapters

    @property
    def weights_to_load(self) -> tuple[str, str] | None:
        """Path and format of the whole checkpoint that a new engine process loads first; None: as it was started."""
        return self._fleet.weights_to_load

    @property
    def staged_in_use(self) -> frozenset[str]:
        """See `Fleet.staged_in_use`."""
        return self._fleet.staged_in_use

    def call_when_staged_in_use_changes(self, call: Callable[[], None]) -> None:
        """`call` runs in the event loop, after each change of `staged_in_use`."""
        self._driver.on_staged_in_use = call

    def silent_for_s(self) -> float:
        """Seconds since the last message of the serving engine that has been silent longest."""
        now_s = asyncio.get_running_loop().time()
        heard_s = (link.last_heard_s for link in self._links if self._router.why_out(link) is None)
        return now_s - min(heard_s, default=float("-inf"))

    # --- work --------------------------------------------------------------------------------------

    def generate(self, request: Generate, *, engine: int | None = None) -> Generation:
        """Send a request at once: to `engine`, or to the one that the router chooses.

        The caller owns the generation and closes it. Raises EngineGone when no engine is there, EngineOut,
        NoSuchEngine, and RidInUse when a running request has this rid.
        """
        if self._refusal is not None:
            raise self._refusal
        if any(link.has_running(request.rid) for link in self._links):
            raise RidInUse(request.rid)
        link = self._router.choose(request, engine=engine)
        generation = link.generate(request)
        self._router.sent(request, link)
        return generation

    @contextmanager
    def together(self) -> Iterator[None]:
        """Requests that `generate` sends inside reach each engine in one message. No `await` may be inside."""
        with ExitStack() as held:
            for link in self._links:
                held.enter_context(link.together())
            yield

    def forget_prefixes(self) -> None:
        """The engines' caches were emptied: a known prefix is no longer a reason to prefer an engine."""
        self._router.forget_all()

    def flushed(self, flush: FlushCache) -> None:
        """A flush was carried out: the pins that it ended are not set again on a restarted engine."""
        self._fleet.flushed(flush)

    async def change(self, change: Change, *, deadline_s: float, engines: Sequence[int] | None = None) -> Outcome:
        """A change of the desired state, made by all engines (or by `engines`) or by none.

        `deadline_s` is a time of the event loop; the outcome comes within a second of it, even if an engine is silent.
        Cancelling it cancels the change, unless it is decided.
        """
        return await self._driver.change(change, deadline_s=deadline_s, engines=engines)

    async def call(self, message: Any, *, engine: int = 0, timeout_s: float | None = None) -> Any:
        """Send a message of `ToEngine` with a fresh call_id to one engine; the struct it answers.

        Cancelling a deferred call, or its timeout, cancels it in the engine as well.
        Raises CallFailed when refused, EngineGone, TimeoutError.
        """
        return await self._links[engine].call(message, timeout_s=timeout_s)

    async def relay(self, message: Call) -> Any:
        """The answer of the only engine to a message of the fleet that this server is a replica of.

        A message that comes again is answered as the first one was (`RelayedCalls`).
        """
        ready = self._links[0].ready
        if isinstance(message, Hello):
            if ready is None:
                raise EngineLoading(0)
            return msgspec.structs.replace(ready, call_id=message.call_id)
        return await self._relayed.answer(message)

    async def call_all(self, message: Any, *, timeout_s: float | None = None) -> list[Any]:
        """Send a message to every engine; per engine its answer, or the exception that stands for it.

        It does not wait for engines that are loading (EngineLoading) or take no requests (EngineOut).
        """

        async def call(index: int) -> Any:
            if self._links[index].is_loading:
                raise EngineLoading(index)
            if (why := self._fleet.why_out(index)) is not None:
                raise EngineOut(index, why)
            return await self.call(message, engine=index, timeout_s=timeout_s)

        return await asyncio.gather(*map(call, range(self.num_engines)), return_exceptions=True)

    async def call_all_by(self, message: FlushCache, *, deadline_s: float, answer_by_s: float) -> list[Any]:
        """Send a flush to every engine; per engine its answer, or the exception that stands for it.

        Both are times of the event loop. Every engine gets the time that is left until `deadline_s`, also an engine
        that has to be waited for because it is loading. An engine that is silent at `answer_by_s` is a TimeoutError.
        """
        calls = [
            self._call_by(message, engine=index, deadline_s=deadline_s, answer_by_s=answer_by_s)
            for index in range(self.num_engines)
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    async def _call_by(self, message: FlushCache, *, engine: int, deadline_s: float, answer_by_s: float) -> Any:
        clock = asyncio.get_running_loop().time
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._links[engine].wait_ready()
        except TimeoutError:
            raise EngineLoading(engine) from None
        left_s = max(deadline_s - clock(), min(message.timeout_s, _SHORTEST_S))
        message = msgspec.structs.replace(message, timeout_s=min(left_s, message.timeout_s))
        return await self.call(message, engine=engine, timeout_s=max(0.0, answer_by_s - clock()))

    def _fail(self, link: EngineLink, error: EngineGone) -> None:
        link.fail(error)
        self._driver.engine_gone(error)
