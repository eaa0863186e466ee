"""What routes work with: the state, and the parts made from it once the model has loaded."""

import asyncio
import itertools
import logging
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, Request

from headwater.client.engine_client import new_call_id
from headwater.client.errors import CallFailed, EngineGone, EngineLoading
from headwater.generation.errors import ApiError, bad_request, loading
from headwater.generation.model_facts import ModelFacts
from headwater.generation.native import NativeApi
from headwater.generation.text_generation import TextGenerator
from headwater.generation.text_request import TextRequest
from headwater.generation.validation import timeout_seconds
from headwater.http_api.engine_answers import EngineAnswers
from headwater.http_api.monitoring.metrics import Metrics
from headwater.http_api.state import ApiState
from headwater.messages.control import FlushCache, FlushResult
from headwater.messages.generation import RequestOptions, SamplingParams
from headwater.messages.state import EngineState, GetState, Ping
from headwater.messages.two_phase import Change
from headwater.messages.wire import ToEngine

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 30.0  # for calls the engine answers in its next turn
HOLD_POLL_S = 0.5  # how often a health check that waits for its token asks what holds it
FRESH_S = 1.0  # an engine heard from within this time needs no ping


@dataclass(frozen=True, slots=True)
class GenerationHealth:
    """Whether tokens come out, or would if no orders (`held_by`) kept requests waiting."""

    is_well: bool
    held_by: tuple[str, ...] = ()


class Services:
    """One per app. Properties that need the model raise ApiError 503 while it loads."""

    def __init__(self, state: ApiState) -> None:
        self.state = state
        self.metrics = Metrics()
        self._pin_numbers = itertools.count(1)
        self._ping: asyncio.Task[None] | None = None

    @property
    def model(self) -> ModelFacts:
        return self.state.require_model()[1]

    @property
    def generator(self) -> TextGenerator:
        tokenizer, model = self.state.require_model()
        return TextGenerator(
            self.state.client,
            tokenizer,
            observer=self.metrics.observer(model.served_name),
            special_tokens=self.state.special_tokens,
        )

    @property
    def native_api(self) -> NativeApi:
        return NativeApi(self.generator, self.model, self.state.limits)

    def new_pin_id(self) -> str:
        """The same on every engine, also after a restart."""
        return f"pin-{next(self._pin_numbers)}"

    def require_loaded(self) -> None:
        """Raises ApiError 503 while the model loads."""
        if self.state.model is None:
            raise loading()

    def control_timeout_s(self, given: Any, *, default_s: float) -> float:
        """The time a control request may wait. InvalidRequest that names the range."""
        max_s = self.state.limits.max_control_timeout_s
        if given is None:
            return min(default_s, max_s)
        try:
            return timeout_seconds(given, max_s)
        except ValueError as error:
            raise bad_request("timeout", f"timeout: {error}") from None

    async def ask_all(self, message: ToEngine) -> EngineAnswers:
        """The answers of all engines to a call that they answer in their next turn."""
        return EngineAnswers(await self.state.client.call_all(message, timeout_s=CALL_TIMEOUT_S))

    async def flush_all(self, message: FlushCache, *, arrived_s: float, has_timeout: bool) -> list[Any]:
        """The answers of all engines to a flush that waits up to `message.timeout_s` from `arrived_s` (loop time).

        A caller who gave a timeout is answered within a second of it; without one, a busy engine is waited for.
        """
        deadline_s = arrived_s + message.timeout_s
        answer_by_s = deadline_s if has_timeout else arrived_s + CALL_TIMEOUT_S
        answers = await self.state.client.call_all_by(message, deadline_s=deadline_s, answer_by_s=answer_by_s)
        if any(isinstance(answer, FlushResult) and answer.success for answer in answers):
            self.state.client.flushed(message)
        return answers

    async def change(
        self, message: Change, *, arrived_s: float, timeout_s: float | None = None, engines: list[int] | None = None
    ) -> EngineAnswers:
        """The outcome of a change that all engines make, or none, within a second of `timeout_s`.

        None: the caller gave no timeout, and engines that are busy with a step have 30 s.
        """
        deadline_s = arrived_s + (CALL_TIMEOUT_S if timeout_s is None else timeout_s)
        outcome = await self.state.client.change(message, deadline_s=deadline_s, engines=engines)
        return EngineAnswers.of_change(outcome)

    async def engine_states(self, *, timeout_s: float = 5.0) -> list[EngineState | Exception]:
        """A snapshot of each engine, or why there is none."""
        return await self.state.client.call_all(GetState(call_id=new_call_id()), timeout_s=timeout_s)

    async def is_alive(self) -> bool:
        """Whether an engine serves, and the loop of each serving engine still turns. Cheap: probes share one ping.

        An engine that is being restarted does not make the server unhealthy.
        """
        if not self.state.is_serving:
            return False
        if self.state.client.silent_for_s() < FRESH_S:
            return True
        if self._ping is None or self._ping.done():
            self._ping = asyncio.ensure_future(self._ping_all())
        try:
            await asyncio.shield(self._ping)
        except (CallFailed, TimeoutError) as error:
            log.warning("the engine is not healthy: %s", error or "no answer in time")
            return False
        return self.state.is_serving

    async def is_ready(self) -> bool:
        """Whether a request would be taken now by engines that answer. Returns within the ready timeout."""
        try:
            async with asyncio.timeout(self.state.limits.ready_timeout_s):
                return await self.is_alive()
        except TimeoutError:  # the ping goes on: others may wait for it
            return False

    async def _ping_all(self) -> None:
        timeout_s = self.state.limits.health_timeout_s
        for answer in await self.state.client.call_all(Ping(call_id=new_call_id()), timeout_s=timeout_s):
            if isinstance(answer, Exception) and not isinstance(answer, EngineGone | EngineLoading):
                raise answer

    async def generation_health(self) -> GenerationHealth:
        """Whether a token comes out within the health timeout. Not tried while requests run or wait by order."""
        if not await self.is_alive():
            return GenerationHealth(is_well=False)
        try:
            async with asyncio.timeout(self.state.limits.health_timeout_s):
                return GenerationHealth(is_well=True, held_by=await self._one_token_or_holds())
        except (EngineGone, EngineLoading, TimeoutError, ApiError) as error:
            log.warning("generating a token failed: %s", error or "no answer in time")
            return GenerationHealth(is_well=False)

    async def _one_token_or_holds(self) -> tuple[str, ...]:
        """Returns when a token has come, surely comes, or cannot come since all engines are held: by what."""
        engine, held_by = await self._idle_engine()
        if engine is None:
            return held_by
        generating = asyncio.ensure_future(self._generate_one_token(engine))
        try:
            while not (await asyncio.wait({generating}, timeout=HOLD_POLL_S))[0]:
                now_idle, held_by = await self._idle_engine()  # an order may have come since
                if now_idle is None:
                    return held_by
                if now_idle != engine:
                    return await self._one_token_or_holds()
            await generating
            return ()
        finally:
            generating.cancel()
            await asyncio.gather(generating, return_exceptions=True)

    async def _idle_engine(self) -> tuple[int | None, tuple[str, ...]]:
        """An engine to try, None if some run requests or all are held; and what holds them if all are."""
        answers = await self.engine_states(timeout_s=self.state.limits.health_timeout_s)
        states = [(rank, answer) for rank, answer in enumerate(answers) if isinstance(answer, EngineState)]
        if not states:
            assert isinstance(answers[0], Exception)
            raise answers[0]
        free = [(rank, state) for rank, state in states if not state.held_by]
        if not free:
            return None, tuple(dict.fromkeys(order for _, state in states for order in state.held_by))
        if any(state.num_running for _, state in free):
            return None, ()
        return free[0][0], ()

    async def _generate_one_token(self, engine: int) -> None:
        tokenizer, _ = self.state.require_model()
        prompt = np.array([tokenizer.bos_token_id or 0], dtype=np.int32)
        sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        request = TextRequest(
            rid=f"health-{new_call_id()}",
            prompt_ids=prompt,
            sampling=sampling,
            options=RequestOptions(no_store=True),
            engine=engine,
        )
        generation = TextGenerator(self.state.client, tokenizer).start(request)
        try:
            await generation.run()
        finally:
            generation.close()


async def _services_of(request: Request) -> Services:
    """A coroutine: FastAPI calls a plain function in a thread, each time."""
    return request.app.state.services


InjectedServices = Annotated[Services, Depends(_services_of)]  # the type of a route's parameter `services`
