"""Whether the engines are alive, would take a request, and generate."""

import asyncio
import logging
from array import array
from dataclasses import dataclass

from headwater.client.change_call import by_engine
from headwater.client.engine_client import new_call_id
from headwater.client.errors import CallFailed, EngineGone, EngineLoading
from headwater.generation.errors import ApiError
from headwater.generation.text_generation import TextGenerator
from headwater.generation.text_request import TextRequest
from headwater.http_api.state import ApiState
from headwater.messages.generation import RequestOptions, SamplingParams
from headwater.messages.state import EngineState, GetState, Ping

log = logging.getLogger(__name__)

HOLD_POLL_S = 0.5  # how often a health check that waits for its token asks what holds it
FRESH_S = 1.0  # an engine heard from within this time needs no ping


@dataclass(frozen=True, slots=True)
class GenerationHealth:
    """Whether tokens come out, or would if no orders (`held_by`) kept requests waiting."""

    is_well: bool
    held_by: tuple[str, ...] = ()


class Health:
    """Answers health checks. One per app, so that simultaneous probes share a ping."""

    def __init__(self, state: ApiState) -> None:
        self._state = state
        self._ping: asyncio.Task[None] | None = None

    async def is_alive(self) -> bool:
        """Whether an engine serves, and the loop of each serving engine still turns. Cheap: probes share one ping.

        An engine that is being restarted does not make the server unhealthy.
        """
        if not self._state.is_serving:
            return False
        if self._state.client.silent_for_s() < FRESH_S:
            return True
        if self._ping is None or self._ping.done():
            self._ping = asyncio.ensure_future(self._ping_all())
        try:
            await asyncio.shield(self._ping)
        except (CallFailed, TimeoutError) as error:
            log.warning("the engine is not healthy: %s", error or "no answer in time")
            return False
        return self._state.is_serving

    async def is_ready(self) -> bool:
        """Whether a request would be taken now by engines that answer. Returns within the ready timeout."""
        try:
            async with asyncio.timeout(self._state.limits.ready_timeout_s):
                return await self.is_alive()
        except TimeoutError:  # the ping goes on: others may wait for it
            return False

    async def _ping_all(self) -> None:
        timeout_s = self._state.limits.health_timeout_s
        for answer in await self._state.client.call_all(Ping(call_id=new_call_id()), timeout_s=timeout_s):
            if isinstance(answer, Exception) and not isinstance(answer, EngineGone | EngineLoading):
                raise answer

    async def of_generation(self) -> GenerationHealth:
        """Whether a token comes out within the health timeout. Not tried while requests run or wait by order."""
        if not await self.is_alive():
            return GenerationHealth(is_well=False)
        try:
            async with asyncio.timeout(self._state.limits.health_timeout_s):
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
        timeout_s = self._state.limits.health_timeout_s
        answers = await self._state.client.call_all(GetState(call_id=new_call_id()), timeout_s=timeout_s)
        states = [(rank, answer) for rank, answer in by_engine(answers) if isinstance(answer, EngineState)]
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
        tokenizer, _ = self._state.require_model()
        prompt = array("i", [tokenizer.bos_token_id or 0])
        sampling = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        request = TextRequest(
            rid=f"health-{new_call_id()}",
            prompt_ids=prompt,
            sampling=sampling,
            options=RequestOptions(no_store=True),
            engine=engine,
        )
        generation = TextGenerator(self._state.client, tokenizer).start(request)
        try:
            await generation.run()
        finally:
            generation.close()
