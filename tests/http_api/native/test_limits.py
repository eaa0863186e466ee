"""Limits as clients meet them: status, Retry-After, error code, and the counts in the metrics."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_under_test import Api, api, error_of, until
from loop_engines import LoopEngine, loop_engines
from prometheus_client.parser import text_string_to_metric_families

from headwater.generation.model_facts import RequestLimits
from headwater.messages.generation import Finish, Generate
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
PROMPT = list(range(100, 122))
BODY = {"input_ids": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 8}}


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[LoopEngine]:
    limits = {"max_queued_tokens": 50, "queue_timeout_s": 4.0, "request_timeout_s": 60.0}
    with loop_engines(tmp_path, num_pages=64, max_queued=4, max_context=200, limits=limits) as (engine,):
        yield engine


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path, num_pages=64, max_queued=4, max_context=200, limits={"max_queue_share": 0.5}) as (it,):
        yield it


async def limited_requests(server: Api) -> dict[str, float]:
    page = (await server.http.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(page)}
    return {sample.labels["reason"]: sample.value for sample in families["headwater_limited_requests"].samples}


async def test_waiting_requests_end_with_503_after_the_timeout_and_tokens_in_the_queue_are_bounded(limited) -> None:
    async with api(limited) as server:
        await server.post("/pause_generation", {"mode": "retract"})
        waiting = [asyncio.ensure_future(server.post("/generate", BODY)) for _ in range(2)]
        await until(lambda: server.state.client.num_running == 2)
        refused = await server.post("/generate", BODY | {"stream": True})
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        for answer in await asyncio.gather(*waiting):
            assert (answer.status_code, error_of(answer)["code"]) == (503, "queue_timeout")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        counts = await limited_requests(server)
        assert (counts["queued_tokens"], counts["queue_timeout"], counts["request_timeout"]) == (1, 2, 0)
        await server.post("/continue_generation", {})
        assert (await server.post("/generate", BODY)).status_code == 200


async def test_keys_have_a_share_of_the_queue_each(shared) -> None:
    async with api(shared, api_key="one,two", admin_api_key="admin") as server:
        admin, one, two = ({"authorization": f"Bearer {key}"} for key in ("admin", "one", "two"))
        await server.http.post("/pause_generation", json={"mode": "retract"}, headers=admin)
        short = {"input_ids": PROMPT[:5]}
        waiting = [asyncio.ensure_future(server.http.post("/generate", json=short, headers=one)) for _ in range(2)]
        await until(lambda: server.state.client.num_running == 2)
        assert (await server.http.post("/generate", json=short, headers=one)).status_code == 429
        waiting.append(asyncio.ensure_future(server.http.post("/generate", json=short, headers=two)))
        await until(lambda: server.state.client.num_running == 3)
        await server.http.post("/continue_generation", json={}, headers=admin)
        assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}


async def test_requests_of_one_key_run_at_most_so_many_at_a_time(engine: ScriptedEngine) -> None:
    engine.script.is_stalled = True
    limits = RequestLimits(max_concurrency_per_key=1)
    async with api(engine, api_key="one,two", limits=limits) as server:
        one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        body = {"prompt": "a", "n": 3}
        running = asyncio.ensure_future(server.http.post("/v1/completions", json=body, headers=one))
        await until(lambda: len(engine.of_type(Generate)) == 3)
        for is_stream in (False, True):
            refused = await server.http.post("/v1/completions", json=body | {"stream": is_stream}, headers=one)
            assert (refused.status_code, error_of(refused)["code"]) == (429, "too_many_requests")
            assert int(refused.headers["retry-after"]) >= 1
        other = asyncio.ensure_future(server.http.post("/v1/completions", json=body, headers=two))
        await until(lambda: len(engine.of_type(Generate)) == 6)
        assert len({request.account for request in engine.of_type(Generate)}) == 2
        running.cancel()
        await until(lambda: server.app.state.services.accounts.all[1].num_running == 0)
        assert (await limited_requests(server))["concurrency"] == 2
        again = asyncio.ensure_future(server.http.post("/v1/completions", json=body, headers=one))
        await until(lambda: len(engine.of_type(Generate)) == 9)
        for task in (again, other):
            task.cancel()


async def test_a_request_that_took_too_long_is_a_504_that_sdks_do_not_repeat(engine: ScriptedEngine) -> None:
    engine.script.refusal = Finish(type="abort", status=504, message="too long", err_type="timeout", code="x")
    async with api(engine) as server:
        response = await server.post("/v1/completions", {"prompt": "a"})
        assert (response.status_code, response.headers["x-should-retry"]) == (504, "false")


async def test_limits_are_shown_and_keys_are_not(engine: ScriptedEngine) -> None:
    arguments = {"max_concurrency_per_key": 3, "api_key": "one,two", "queue_timeout": 2.5}
    async with api(engine, server_args=arguments) as server:
        info = (await server.http.get("/server_info")).json()
        assert {name: info[name] for name in arguments} == arguments | {"api_key": "***"}
