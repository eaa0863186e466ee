"""Flush while 16 clients never let the engine be idle: nobody is refused, lost, or given another text."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from api_under_test import Api, api, until
from loop_engines import LoopEngine, expected, loop_engines, prompt_of

from processes import Stalls

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("patience")]
NUM_CLIENTS = 16
NUM_TOKENS = 12
STEP_S = 0.004
JSON = {"accept": "application/json"}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path, num_pages=1024) as (engine,):
        engine.step_s = STEP_S
        yield engine


class SteadyLoad:
    """Clients that send their next request as soon as they have the answer to the last one."""

    def __init__(self, server: Api) -> None:
        self.num_answers = 0
        self.wrong: list[Any] = []
        self._server = server
        self._is_over = False

    async def client(self, name: int) -> None:
        prompt, num_tokens = prompt_of(name), NUM_TOKENS + name % 10
        right = expected(prompt, num_tokens)
        sampling = {"temperature": 0, "max_new_tokens": num_tokens}
        while not self._is_over:
            response = await self._server.post("/generate", {"input_ids": prompt, "sampling_params": sampling})
            self.num_answers += 1
            if response.status_code != 200:
                self.wrong.append(response.text)
            elif response.json()["output_ids"] != right:
                self.wrong.append(response.json())

    async def go_on_for(self, num_answers: int) -> None:
        """Wait until so many more answers have come: nothing is stuck."""
        wanted = self.num_answers + num_answers
        await until(lambda: self.num_answers >= wanted, timeout_s=20)

    def end(self) -> None:
        self._is_over = True


@asynccontextmanager
async def under_load(engine: LoopEngine) -> AsyncIterator[tuple[Api, SteadyLoad]]:
    """An app with its 16 clients at work; at the end every request must have had its right answer."""
    async with api(engine) as server:
        load = SteadyLoad(server)
        clients = [asyncio.ensure_future(load.client(100 + number)) for number in range(NUM_CLIENTS)]
        await load.go_on_for(NUM_CLIENTS)
        yield server, load
        await load.go_on_for(NUM_CLIENTS)
        load.end()
        await asyncio.wait_for(asyncio.gather(*clients), 20)
        assert load.wrong == []
        assert server.state.client.num_running == 0


async def flush(server: Api, **parameters: Any) -> tuple[int, dict[str, Any]]:
    response = await server.http.post("/flush_cache", json=parameters, headers=JSON)
    return response.status_code, response.json()


async def cached(server: Api, prompt: list[int], **scope: str) -> int:
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 2, "temperature": 0}} | scope
    answer = (await server.post("/generate", body)).json()
    return answer["meta_info"]["cached_tokens"]


async def test_now_answers_in_a_step_and_is_cold_in_its_scope_and_warm_outside(engine: LoopEngine) -> None:
    probe = prompt_of(1)
    async with under_load(engine) as (server, load):
        for _ in range(5):
            for scope in ({}, {"cache_salt": "tenant"}):
                await cached(server, probe, **scope)
            with Stalls() as stalls:
                status, answer = await flush(server, mode="now", cache_salt="tenant")
            assert (status, answer["success"]) == (200, True)
            assert answer["waited_s"] < 0.2 + stalls.lost_s, "no waiting for anybody"
            assert await cached(server, probe, cache_salt="tenant") == 0
            assert await cached(server, probe) == 36
            status, answer = await flush(server, mode="now")
            assert (status, answer["drained"]) == (200, False), "requests are running, and go on"
            assert await cached(server, probe) == 0
            await load.go_on_for(4)


async def test_idle_expires_with_blockers_and_flushes_nothing(engine: LoopEngine) -> None:
    async with under_load(engine) as (server, _):
        await cached(server, prompt_of(1))
        started_s = time.monotonic()
        with Stalls() as stalls:
            status, answer = await flush(server, timeout=1)
            took_s = time.monotonic() - started_s
        assert 1 <= took_s < 2.5 + stalls.lost_s
        assert (status, answer["message"]) == (400, "Timed out waiting for idle state.")
        assert answer["blockers"]["running"] > 0
        assert answer["blockers"]["queued"] > 0
        assert await cached(server, prompt_of(1)) == 36


async def test_hold_finds_an_idle_moment_and_the_queue_goes_on(engine: LoopEngine) -> None:
    async with under_load(engine) as (server, load):
        for _ in range(5):
            await cached(server, prompt_of(1))
            status, answer = await flush(server, timeout=20, hold=True)
            assert (status, answer["drained"]) == (200, True)
            assert answer["retired"]["device"]["pages"] == 0, "at an idle moment nobody holds anything"
            assert await cached(server, prompt_of(1)) == 0
            await load.go_on_for(4)


async def test_drain_waits_for_those_that_ran_and_for_no_others(engine: LoopEngine) -> None:
    async with under_load(engine) as (server, _):
        for _ in range(5):
            pending = asyncio.ensure_future(flush(server, timeout=20, mode="drain"))
            await until(lambda: engine.parts.control.num_pending)
            # Others may have started since the cut: what counts is who held pages of before it.
            running = list(engine.parts.scheduler.running)
            old = {request for request in running if (lease := request.lease) is not None and lease.retirements}
            status, answer = await pending
            left = set(engine.parts.scheduler.running)
            assert (status, answer["drained"]) == (200, True)
            assert not old & left, "a request that held old pages still runs"
            assert engine.parts.scheduler.running, "and yet the engine was never idle"


async def test_everything_at_once(engine: LoopEngine) -> None:
    """Flushes of all modes and scopes side by side under load: each gets its answer, no text changes."""
    scopes: list[dict[str, Any]] = [
        {"mode": "now"},
        {"mode": "now", "prefix_ids": prompt_of(103)[:10]},
        {"mode": "drain", "timeout": 10},
        {"mode": "drain", "timeout": 0.01},
        {"timeout": 10, "hold": True},
        {"timeout": 0.01},
        {"dry_run": True},
        {"mode": "now", "cache_salt": ""},
    ]
    async with under_load(engine) as (server, load):
        for _ in range(4):
            answers = await asyncio.gather(*(flush(server, **scope) for scope in scopes))
            assert [status for status, _ in answers if status not in (200, 202, 400)] == []
            assert [answers[i][0] for i in (0, 1, 2, 4, 6, 7)] == [200] * 6
            await load.go_on_for(4)
