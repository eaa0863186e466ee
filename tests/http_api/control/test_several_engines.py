"""One API process, several engines: who gets a request, and what is answered when one of them differs."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_under_test import Api, api, error_of, until
from loop_engines import LoopEngine, expected, loop_engines, prompt_of
from prometheus_client.parser import text_string_to_metric_families

from headwater.client.engine_choice import MAX_EXTRA_REQUESTS
from headwater.simulation.fakes.memory import FakeStagedWeights
from processes import Stalls

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("patience")]
JSON = {"accept": "application/json"}
Engines = list[LoopEngine]


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    with loop_engines(tmp_path, count=2) as engines:
        yield engines


async def generate(server: Api, prompt: list[int], num_tokens: int = 4, **more: Any) -> dict[str, Any]:
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens}}
    response = await server.post("/generate", body | more)
    assert response.status_code == 200, response.text
    assert response.json()["output_ids"] == expected(prompt, num_tokens)
    return response.json()["meta_info"]


async def rank_of(server: Api, prompt: list[int], **more: Any) -> int:
    return (await generate(server, prompt, **more))["dp_rank"]


async def flush(server: Api, status: int = 200, **parameters: Any) -> dict[str, Any]:
    response = await server.http.post("/flush_cache", json=parameters, headers=JSON)
    assert response.status_code == status, response.text
    return response.json()


async def keep_busy(server: Api, engine: LoopEngine, rank: int, count: int = 1) -> list["asyncio.Future[Any]"]:
    """Requests that run on one engine until its `step_s` is 0 again."""
    engine.step_s = 0.02
    tasks = [
        asyncio.ensure_future(generate(server, prompt_of(50 + 10 * rank + n), 200, routed_dp_rank=rank))
        for n in range(count)
    ]
    await until(lambda: len(engine.parts.scheduler.running) == count)
    return tasks


# --- who gets a request ----------------------------------------------------------------------------------


async def test_requests_spread_over_the_engines(engines: Engines) -> None:
    async with api(*engines) as server:
        for engine in engines:
            engine.step_s = 0.02
        tasks = [asyncio.ensure_future(generate(server, prompt_of(n), 30)) for n in range(8)]
        await until(lambda: all(len(e.parts.scheduler.running) == 4 for e in engines))
        for engine in engines:
            engine.step_s = 0.0
        ranks = [(await task)["dp_rank"] for task in tasks]
        assert sorted(ranks) == [0] * 4 + [1] * 4


async def test_a_known_prefix_goes_to_the_engine_that_has_it(engines: Engines) -> None:
    async with api(*engines) as server:
        for rank in (0, 1):
            await generate(server, prompt_of(rank), routed_dp_rank=rank)
        for _ in range(3):
            for rank in (1, 0):
                meta = await generate(server, [*prompt_of(rank)[:36], 7, 7, 7, 7])
                assert (meta["dp_rank"], meta["cached_tokens"]) == (rank, 36)
        assert await rank_of(server, prompt_of(1), cache_salt="other") == 0, "another namespace has nothing there"


async def test_a_prefix_does_not_pile_requests_onto_one_engine(engines: Engines) -> None:
    """All prompts begin alike: the engine that has the prefix takes a few more, then the other one learns it."""
    async with api(*engines) as server:
        await generate(server, prompt_of(1), routed_dp_rank=0)
        for engine in engines:
            engine.step_s = 0.1  # 30 of them outlast the sixteen arrivals, however slow the machine is
        tasks = []
        for n in range(16):  # one by one: only so is the first sent the first to arrive
            tasks.append(asyncio.ensure_future(generate(server, prompt_of(1) + [n] * 4, 30)))
            await until(lambda n=n: server.state.client.num_running == n + 1)
        for engine in engines:
            engine.step_s = 0.0
        ranks = [(await task)["dp_rank"] for task in tasks]
        assert ranks[:MAX_EXTRA_REQUESTS] == [0] * MAX_EXTRA_REQUESTS
        assert abs(ranks.count(0) - ranks.count(1)) <= MAX_EXTRA_REQUESTS + 1


async def test_a_request_may_name_its_engine(engines: Engines) -> None:
    async with api(*engines) as server:
        for name in ("routed_dp_rank", "data_parallel_rank"):
            for rank in (1, 0):
                assert await rank_of(server, prompt_of(1), **{name: rank}) == rank
        for rank in (2, -1):
            response = await server.post("/generate", {"text": "abcd", "routed_dp_rank": rank})
            assert (response.status_code, error_of(response)["param"]) == (400, "routed_dp_rank")
            assert "from 0 to 1" in error_of(response)["message"]


async def test_after_a_flush_an_old_prefix_is_no_reason_to_prefer_an_engine(engines: Engines) -> None:
    async with api(*engines) as server:
        await generate(server, prompt_of(1), routed_dp_rank=1)
        await flush(server)
        assert await rank_of(server, prompt_of(1)) == 0


async def test_a_request_goes_to_the_engine_that_is_left(engines: Engines) -> None:
    async with api(*engines) as server:
        await generate(server, prompt_of(1), routed_dp_rank=1)
        server.state.client.engine_gone(1, "killed")
        assert await rank_of(server, prompt_of(1)) == 0
        response = await server.post("/generate", {"text": "abcd", "routed_dp_rank": 1})
        assert (response.status_code, error_of(response)["engine"]) == (503, 1)
        assert (await server.http.get("/health")).status_code == 200, "half of the server serves"
        assert (await server.http.get("/ready")).status_code == 200
        server.state.client.engine_gone(0, "killed")
        assert (await server.http.get("/health")).status_code == 503


# --- fan-out ---------------------------------------------------------------------------------------------


async def test_a_flush_reaches_every_engine_and_sums_up(engines: Engines) -> None:
    async with api(*engines) as server:
        for rank in (0, 1):
            for name in range(rank + 1):
                await generate(server, prompt_of(name), routed_dp_rank=rank)
        preview = await flush(server, dry_run=True)
        answer = await flush(server)
        assert [e["freed"] for e in preview["engines"]] == [e["freed"] for e in answer["engines"]]
        pages = [engine["freed"]["device"]["pages"] for engine in answer["engines"]]
        assert pages[1] == 2 * pages[0] > 0
        assert answer["freed"]["device"]["pages"] == sum(pages)
        assert [engine["dp_rank"] for engine in answer["engines"]] == [0, 1]
        for rank in (0, 1):
            assert (await generate(server, prompt_of(0), routed_dp_rank=rank))["cached_tokens"] == 0


async def test_one_engine_that_cannot_makes_it_no_success_and_hides_no_other(engines: Engines) -> None:
    async with api(*engines) as server:
        await generate(server, prompt_of(1), routed_dp_rank=0)
        busy = await keep_busy(server, engines[1], 1)
        answer = await flush(server, 400, timeout=0.3)
        assert answer["success"] is False
        assert answer["message"].startswith("Timed out waiting for idle state.")
        assert "flushed on engine 0, not on engine 1" in answer["message"]
        assert answer["blockers"] == {"running": 1}
        first, second = answer["engines"]
        assert (first["success"], first["freed"]["device"]["pages"] > 0) == (True, True)
        assert (second["success"], second["blockers"]) == (False, {"running": 1})
        text = (await server.http.get("/flush_cache")).text
        assert text.startswith("Flush cache failed.")
        assert "flushed on engine 0, not on engine 1" in text
        engines[1].step_s = 0.0
        await asyncio.gather(*busy)


async def test_every_engine_flushes_at_an_idle_moment_of_its_own(engines: Engines) -> None:
    """They are never idle at the same time; the flush must not wait for that."""
    async with api(*engines) as server:
        busy = await keep_busy(server, engines[0], 0)
        pending = asyncio.ensure_future(flush(server, timeout=30))
        await until(lambda: engines[0].parts.control.num_pending and engines[1].parts.cache.generation == 0)
        await until(lambda: not engines[1].parts.control.num_pending)
        busy += await keep_busy(server, engines[1], 1)
        engines[0].step_s = 0.0
        answer = await asyncio.wait_for(pending, 20)
        assert answer["success"]
        waited = [engine["waited_s"] for engine in answer["engines"]]
        assert waited[0] > waited[1]
        assert answer["waited_s"] == max(waited)
        assert engines[1].parts.scheduler.running, "the second one works again"
        engines[1].step_s = 0.0
        await asyncio.gather(*busy)


async def test_an_engine_that_goes_during_a_flush_is_named_and_the_other_one_heard(engines: Engines) -> None:
    async with api(*engines) as server:
        await generate(server, prompt_of(1), routed_dp_rank=0)
        busy = await keep_busy(server, engines[1], 1)
        pending = asyncio.ensure_future(flush(server, 503, timeout=30))
        await until(lambda: engines[1].parts.control.num_pending)
        server.state.client.engine_gone(1, "the engine process was killed by SIGKILL")
        answer = await asyncio.wait_for(pending, 20)
        assert answer["success"] is False
        assert answer["message"].startswith("engine 1 is gone: the engine process was killed by SIGKILL (since 20")
        first, second = answer["engines"]
        assert (first["success"], first["freed"]["device"]["pages"] > 0) == (True, True)
        assert (second["success"], second["status"], second["code"]) == (False, 503, "engine_gone")
        assert second["since"] in answer["message"]
        engines[1].step_s = 0.0
        await asyncio.gather(*busy, return_exceptions=True)


async def test_an_engine_that_loads_again_is_waited_for_and_gets_what_is_left_of_the_time(
    engines: Engines, tmp_path: Path
) -> None:
    async with api(*engines) as server:
        client = server.state.client
        client.engine_gone(1, "killed")
        later = f"ipc://{tmp_path}/engine-1-again.sock"
        client.engine_back(1, later)
        response = await server.http.post("/flush_cache", headers=JSON)
        assert response.status_code == 503
        assert response.json()["engines"][1]["code"] == "loading"
        assert (await server.http.get("/health")).status_code == 200
        started_s = time.monotonic()
        with Stalls() as stalls:
            expired = await flush(server, 503, timeout=0.3)
            took_s = time.monotonic() - started_s
        assert 0.3 <= took_s < 1.3 + stalls.lost_s
        assert "still loading" in expired["message"]
        pending = asyncio.ensure_future(flush(server, timeout=20))
        await asyncio.sleep(0.3)
        assert not pending.done()
        with LoopEngine(later) as again:
            taken: list[float] = []
            handle = again.parts.control.handle
            again.parts.control.handle = lambda m, c: (taken.append(m.timeout_s), handle(m, c))  # type: ignore[assignment,return-value]
            assert (await pending)["success"]
            assert 15 < taken[0] < 19.8, "the time it took to load is gone"
            client.engine_gone(1, "end of the test")


async def test_operations_on_several_engines_are_one_and_are_cancelled_everywhere(engines: Engines) -> None:
    async with api(*engines) as server:
        await keep_busy(server, engines[0], 0)
        await keep_busy(server, engines[1], 1)
        pending = asyncio.ensure_future(flush(server, 400, timeout=30))
        await until(lambda: all(engine.parts.control.num_pending for engine in engines))
        (operation,) = (await server.http.get("/control/operations")).json()["operations"]
        assert [engine["dp_rank"] for engine in operation["engines"]] == [0, 1]
        assert all(engine["blockers"] == {"running": 1} for engine in operation["engines"])
        response = await server.http.delete(f"/control/operations/{operation['operation_id']}")
        assert [engine["success"] for engine in response.json()["engines"]] == [True, True]
        answer = await pending
        assert [engine["success"] for engine in answer["engines"]] == [False, False]
        assert (await server.http.get("/control/operations")).json() == {"operations": []}
        for engine in engines:
            engine.step_s = 0.0


async def test_a_weight_update_that_one_engine_refuses_is_made_by_none(engines: Engines) -> None:
    """Else two policies serve under one label."""
    async with api(*engines) as server:
        body = {"model_path": "w1", "weight_version": "1"}
        answer = (await server.post("/update_weights_from_disk", body)).json()
        assert (answer["success"], answer["weights_id"]) == (True, "w1")
        assert [engine["weights_id"] for engine in answer["engines"]] == ["w1", "w1"]
        weights = engines[1].runner.weights
        weights.stage = lambda path, load_format: FakeStagedWeights(path, num_polls=3, error="it cannot be read")  # type: ignore[method-assign]
        body = {"model_path": "w2", "weight_version": "2"}
        response = await server.post("/update_weights_from_disk", body)
        assert response.status_code == 400
        answer = response.json()
        assert (answer["success"], answer["num_paused_requests"]) == (False, 0)
        assert "nothing was changed on any engine" in answer["message"]
        first, second = answer["error"]["engines"]
        assert (first["success"], second["success"]) == (False, False)
        assert "another engine could not" in first["message"]
        assert [engine.runner.weights.current for engine in engines] == ["w1", "w1"]
        assert (await server.http.get("/get_weight_version")).json() == {"weight_version": "1"}


async def test_pause_and_continue_reach_every_engine(engines: Engines) -> None:
    async with api(*engines) as server:
        tasks = await keep_busy(server, engines[0], 0) + await keep_busy(server, engines[1], 1, 2)
        answer = (await server.post("/pause_generation", {"mode": "retract"})).json()
        assert answer["num_requests"] == 3
        assert [engine["num_requests"] for engine in answer["engines"]] == [1, 2]
        assert (await flush(server))["success"]
        assert (await server.post("/continue_generation")).status_code == 200
        for engine in engines:
            engine.step_s = 0.0
        assert len(await asyncio.gather(*tasks)) == 3


async def test_a_change_while_an_engine_is_gone_is_made_by_the_others_and_says_which_one_still_has_to(
    engines: Engines,
) -> None:
    async with api(*engines) as server:
        server.state.client.engine_gone(1, "killed")
        response = await server.post("/pause_generation", {"mode": "retract"})
        assert response.status_code == 202
        first, second = response.json()["engines"]
        assert (first["success"], second["success"], second["pending"]) == (True, False, True)
        assert engines[0].parts.control.is_paused
        for path in ("/control/blockers", "/control/operations"):
            assert (await server.http.get(path)).status_code == 200, "what is known is told"
        assert (await server.http.get("/control/blockers")).json()["engines"][1]["code"] == "engine_gone"


async def test_memory_is_released_on_all(engines: Engines) -> None:
    async with api(*engines) as server:
        answer = (await server.post("/release_memory_occupation", {})).json()
        assert answer["num_bytes"] == sum(engine["num_bytes"] for engine in answer["engines"])
        assert all(engine.runner.weights.is_released for engine in engines)
        await server.post("/resume_memory_occupation", {})
        assert not any(engine.runner.weights.is_released for engine in engines)


# --- reports ---------------------------------------------------------------------------------------------


async def test_reports_have_an_entry_for_each_engine(engines: Engines) -> None:
    async with api(*engines) as server:
        await generate(server, prompt_of(1), routed_dp_rank=1)
        info = (await server.http.get("/server_info")).json()
        assert info["dp_size"] == 2
        assert [state["cache_generation"] for state in info["internal_states"]] == [0, 0]
        loads = (await server.http.get("/v1/loads")).json()
        assert [load["dp_rank"] for load in loads["loads"]] == [0, 1]
        assert [load["dp_rank"] for load in (await server.http.get("/get_load")).json()] == [0, 1]
        page = (await server.http.get("/metrics")).text
        families = {family.name: family for family in text_string_to_metric_families(page)}
        for name in ("headwater_engine_up", "sglang:num_running_reqs", "headwater_cache_generation"):
            assert {sample.labels["dp_rank"] for sample in families[name].samples} == {"0", "1"}
        tree = {
            sample.labels["dp_rank"]: sample.value
            for sample in families["headwater_pages"].samples
            if sample.labels["owner"] == "tree"
        }
        assert (tree["0"], tree["1"] > 0) == (0, True)
        server.state.client.engine_gone(0, "killed")
        page = (await server.http.get("/metrics")).text
        (family,) = [f for f in text_string_to_metric_families(page) if f.name == "headwater_engine_up"]
        assert {s.labels["dp_rank"]: s.value for s in family.samples} == {"0": 0, "1": 1}
        info = (await server.http.get("/server_info")).json()
        assert [state["success"] for state in info["internal_states"]] == [False, True]
