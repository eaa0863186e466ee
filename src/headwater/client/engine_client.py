"""The API process's way to its engines: each request to one of them, control calls to one or all."""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import zmq.asyncio

from headwater.client.change_call import Outcome
from headwater.client.desired_state import DesiredPin
from headwater.client.engine_choice import choose_engine
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
from headwater.client.prefix_routes import PrefixRoutes
from headwater.client.standing import LOADING
from headwater.messages.control import FlushCache
from headwater.messages.generation import Generate, RequestOptions, SamplingParams
from headwater.messages.state import EngineReady
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

log = logging.getLogger(__name__)

_PIN_TIMEOUT_S = 60.0  # to compute a prefix and pin it
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
        self._context: zmq.asyncio.Context | None = None
        self._links: tuple[EngineLink, ...] = ()
        self._routes: PrefixRoutes | None = None  # only with several engines
        self._refusal: ShuttingDown | None = None
        self._fleet = Fleet(len(endpoints), new_call_id=new_call_id, started_with=started_with)
        self._driver = FleetDriver(
            self._fleet,
            post=lambda engine, message: self._links[engine].post(message),
            set_pin=self._set_pin_again,
        )

    # --- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect to every engine and say Hello. A second call does nothing."""
        if self._context is not None:
            return
        self._context = zmq.asyncio.Context()
        self._links = tuple(
            EngineLink(index, self._context, on_ready=self._driver.engine_ready, on_answer=self._driver.take_answer)
            for index in range(len(self._endpoints))
        )
        for link, endpoint in zip(self._links, self._endpoints, strict=True):
            link.open(endpoint)

    async def wait_ready(self, *, timeout_s: float | None = None) -> tuple[EngineReady, ...]:
        """Wait until every engine has loaded. Raises EngineGone if one ends before, TimeoutError."""
        assert self._links, "start first"
        async with asyncio.timeout(timeout_s):
            return tuple([await link.wait_ready() for link in self._links])

    async def close(self) -> None:
        """Fail all requests and calls, and close the sockets."""
        self.refuse_all("the server has shut down")
        await self._driver.close()
        await asyncio.sleep(0)  # let the reader tasks see their cancellation
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
        if self._routes is not None:
            self._routes.forget(index)

    def engine_back(self, index: int, endpoint: str) -> None:
        """The supervisor reports that an engine was started again; `wait_ready` waits for its model."""
        link = self._links[index]
        if link.gone is None:
            self._fail(link, EngineGone(index, "replaced by a new process"))
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
        """The facts that each engine reported after loading; None while it loads or is gone."""
        return tuple(link.ready for link in self._links)

    @property
    def is_healthy(self) -> bool:
        """Every engine serves, and this client takes requests."""
        return self._refusal is None and bool(self._links) and not self.engines_out

    @property
    def can_serve(self) -> bool:
        """At least one engine serves, and this client takes requests."""
        return self._refusal is None and bool(self._fleet.candidates())

    @property
    def engines_out(self) -> dict[int, str]:
        """Engines that take no requests now, and why."""
        return {link.index: self._why_out(link) for link in self._links if not self._serves(link)}

    @property
    def weights_to_load(self) -> tuple[str, str] | None:
        """Path and format of the whole checkpoint that a new engine process loads first; None: as it was started."""
        return self._fleet.weights_to_load

    def why_unhealthy(self) -> str | None:
        """A sentence for people, or None when healthy."""
        if self._refusal is not None:
            return self._refusal.reason
        out = self.engines_out
        gone = next((link.gone for link in self._links if link.gone is not None), None)
        if gone is not None:
            return str(gone)
        return next((f"engine {engine} takes no requests: {why}" for engine, why in out.items()), None)

    def silent_for_s(self) -> float:
        """Seconds since the last message of the serving engine that has been silent longest."""
        now_s = asyncio.get_running_loop().time()
        return now_s - min((link.last_heard_s for link in self._links if self._serves(link)), default=float("-inf"))

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
        if engine is not None and self._links and (why := self._fleet.why_out(engine)) is not None:
            raise EngineOut(engine, why)
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
        """Requests that `generate` sends inside reach each engine in one message. No `await` may be inside."""
        with ExitStack() as held:
            for link in self._links:
                held.enter_context(link.together())
            yield

    def forget_prefixes(self) -> None:
        """The engines' caches were emptied: a known prefix is no longer a reason to prefer an engine."""
        if self._routes is not None:
            self._routes.clear()

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
        if not self._links:
            raise EngineGone(engine, "not started")
        return await self._links[engine].call(message, timeout_s=timeout_s)

    async def call_all(self, message: Any, *, timeout_s: float | None = None) -> list[Any]:
        """Send a message to every engine; per engine its answer, or the exception that stands for it.

        It does not wait for engines that are loading (EngineLoading) or take no requests (EngineOut).
        """

        async def call(index: int) -> Any:
            if self._links and self._links[index].is_loading:
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
        if self._links:
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._links[engine].wait_ready()
            except TimeoutError:
                raise EngineLoading(engine) from None
        left_s = max(deadline_s - clock(), min(message.timeout_s, _SHORTEST_S))
        message = msgspec.structs.replace(message, timeout_s=min(left_s, message.timeout_s))
        return await self.call(message, engine=engine, timeout_s=max(0.0, answer_by_s - clock()))

    def _choose(self, request: Generate) -> EngineLink:
        """See `choose_engine`. While all engines load for the first time, each of them is a candidate."""
        links = [self._links[index] for index in self._fleet.candidates()]
        if not links and self._fleet.desired is None:
            links = [link for link in self._links if not link.gone]  # those that are loading for the first time
        if not links:
            out = next((link for link in self._links if self._fleet.why_out(link.index) is not None), None)
            if out is not None:
                raise EngineOut(out.index, self._why_out(out))
            raise (self._links[0].gone if self._links else None) or EngineGone(0, "not started")
        return choose_engine(links, self._routes.known(request) if self._routes else [])

    # --- the fleet ---------------------------------------------------------------------------------

    def _serves(self, link: EngineLink) -> bool:
        return link.ready is not None and self._fleet.why_out(link.index) is None

    def _why_out(self, link: EngineLink) -> str:
        if link.gone is not None:
            return str(link.gone)
        return self._fleet.why_out(link.index) or LOADING

    def _fail(self, link: EngineLink, error: EngineGone) -> None:
        link.fail(error)
        self._driver.engine_gone(error)

    async def _set_pin_again(self, engine: int, pin: DesiredPin) -> None:
        """Compute a prefix and pin it. A pin without room is dropped with a warning: it costs time, not correctness."""
        prefix, clock = pin.message, asyncio.get_running_loop().time
        request = Generate(
            rid=f"pin-{new_call_id()}",
            prompt_ids=prefix.prompt_ids,
            sampling=SamplingParams(max_new_tokens=0, temperature=0.0),
            options=RequestOptions(cache_salt=prefix.cache_salt, extra_key=prefix.extra_key),
        )
        try:
            async with asyncio.timeout(_PIN_TIMEOUT_S):
                async for _ in self._links[engine].generate(request):
                    pass
            ttl_s = max(_SHORTEST_S, pin.ends_at_s - clock())
            again = msgspec.structs.replace(prefix, call_id=new_call_id(), ttl_s=ttl_s, expires_at_s=None)
            await self.call(again, engine=engine, timeout_s=_PIN_TIMEOUT_S)
        except (EngineGone, CallFailed, TimeoutError) as error:
            log.warning("engine %d: pin %s could not be set again: %s", engine, prefix.pin_id, error or "no answer")
