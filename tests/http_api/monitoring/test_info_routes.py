"""Health, info, load and metrics, while loading, serving, without an engine and at the end."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_under_test import MODEL, api, error_of, until
from loop_engines import LoopEngine, loop_engines
from prometheus_client.parser import text_string_to_metric_families

from headwater.generation.model_facts import RequestLimits
from headwater.messages.generation import Generate, OutputMeta
from headwater.messages.state import Ping
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio


@pytest.fixture
def loop_engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path) as (engine,):
        yield engine


async def statuses(server, *paths: str) -> list[int]:
    return [(await server.http.get(path)).status_code for path in paths]


PROBES = ("/health", "/health_generate", "/ready", "/ping")


async def test_probes_while_loading_serving_and_shutting_down(engine: ScriptedEngine) -> None:
    async with api(engine, is_ready=False) as server:
        assert await statuses(server, *PROBES) == [503] * 4
        response = await server.post("/generate", {"text": "a"})
        assert (response.status_code, error_of(response)["code"]) == (503, "loading")
        assert "retry-after" in response.headers
        assert await statuses(server, "/v1/models", "/model_info", "/server_info") == [503] * 3
        assert await statuses(server, "/metrics", "/docs", "/openapi.json") == [200] * 3
    async with api(engine) as server:
        assert await statuses(server, *PROBES) == [200] * 4
        assert (await server.http.head("/health")).status_code == 200
        server.state.begin_shutdown(grace_s=0)
        assert await statuses(server, *PROBES) == [503] * 4
        response = await server.post("/generate", {"text": "a"})
        assert (response.status_code, error_of(response)["code"]) == (503, "shutting_down")


async def test_probes_when_the_engine_is_gone(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        server.state.client.engine_gone(0, "killed")
        assert await statuses(server, *PROBES) == [503] * 4
        response = await server.post("/v1/completions", {"prompt": "a"})
        assert (response.status_code, error_of(response)["code"]) == (503, "engine_gone")
        assert await statuses(server, "/v1/models", "/model_info", "/server_info", "/v1/loads") == [200] * 4


async def test_an_engine_whose_loop_hangs_is_not_healthy(engine: ScriptedEngine, monkeypatch) -> None:
    monkeypatch.setattr("headwater.http_api.monitoring.health.FRESH_S", 0.0)
    async with api(engine) as server:
        patient = server.state.limits
        assert await statuses(server, "/health") == [200]
        engine.script.is_silent = True
        server.state.limits = RequestLimits(health_timeout_s=0.1)
        assert await statuses(server, *PROBES) == [503] * 4
        engine.script.is_silent, server.state.limits = False, patient
        assert await statuses(server, "/health", "/ready") == [200, 200]


async def test_a_stopped_engine_is_not_ready_long_before_it_is_not_healthy(engine: ScriptedEngine, monkeypatch) -> None:
    """Traffic goes elsewhere at once; that it is restarted waits for the longest step."""
    monkeypatch.setattr("headwater.http_api.monitoring.health.FRESH_S", 0.0)
    async with api(engine) as server:
        assert await statuses(server, "/ready") == [200]
        engine.script.is_silent = True
        server.state.limits = RequestLimits(health_timeout_s=30, ready_timeout_s=0.2)
        health = asyncio.ensure_future(server.http.get("/health"))
        async with asyncio.timeout(10):
            assert await statuses(server, "/ready", "/ready") == [503, 503]
        assert not health.done(), "the ping that it waits for goes on"
        health.cancel()


async def test_many_probes_share_one_ping(engine: ScriptedEngine, monkeypatch) -> None:
    monkeypatch.setattr("headwater.http_api.monitoring.health.FRESH_S", 0.0)
    async with api(engine) as server:
        answers = await asyncio.gather(*(server.http.get("/health") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert len(engine.of_type(Ping)) < 5


async def test_health_generate_makes_one_token_that_is_not_kept(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        assert await statuses(server, "/health_generate") == [200]
        (message,) = engine.of_type(Generate)
        assert message.options.no_store
        assert message.sampling.max_new_tokens == 1
        engine.script.is_stalled = True
        running = asyncio.ensure_future(server.post("/generate", {"text": "a"}))
        await until(lambda: len(engine.of_type(Generate)) == 2)
        assert await statuses(server, "/health_generate") == [200]
        assert len(engine.of_type(Generate)) == 2, "not tried while requests run"
        running.cancel()


async def test_health_generate_notices_an_engine_that_gives_no_tokens(engine: ScriptedEngine) -> None:
    engine.script.is_stalled = True
    async with api(engine, limits=RequestLimits(health_timeout_s=0.1)) as server:
        assert await statuses(server, "/health_generate") == [503]
        await until(lambda: engine.num_running == 0)


@pytest.mark.parametrize(
    ("order", "held_by"),
    [
        (("/pause_generation", {"mode": "in_place"}), ["pause"]),
        (("/release_memory_occupation", {"tags": ["kv_cache"]}), ["released_kv_cache"]),
        (("/release_memory_occupation", {"tags": ["weights"]}), ["released_weights"]),
        (("/release_memory_occupation", {}), ["released_kv_cache", "released_weights"]),
    ],
)
async def test_health_generate_is_well_at_once_while_requests_wait_by_order(
    loop_engine: LoopEngine, order: tuple[str, dict], held_by: list[str]
) -> None:
    """A trainer's monitor must not kill the server in the training phase."""
    async with api(loop_engine, limits=RequestLimits(health_timeout_s=60.0)) as server:
        assert (await server.post(*order)).status_code == 200
        async with asyncio.timeout(30):
            response = await server.http.get("/health_generate")
        assert response.status_code == 200
        assert (response.json()["generating"], response.json()["held_by"]) == (False, held_by)


async def test_health_generate_is_well_while_weights_are_taken_again(loop_engine: LoopEngine) -> None:
    async with api(loop_engine) as server:
        await server.post("/release_memory_occupation", {"tags": ["weights"]})
        loop_engine.runner.weights.num_polls = 10**9
        resume = asyncio.ensure_future(server.post("/resume_memory_occupation", {"timeout": 60.0}))
        await until(lambda: loop_engine.parts.control.num_pending)
        response = await server.http.get("/health_generate")
        assert response.status_code == 200 and "resume_memory" in response.json()["held_by"]
        assert not resume.done()
        loop_engine.runner.weights.staged[-1]._polls_left = 0
        assert (await resume).status_code == 200


async def test_health_generate_is_well_if_a_pause_comes_while_it_waits_for_its_token(loop_engine: LoopEngine) -> None:
    async with api(loop_engine, limits=RequestLimits(health_timeout_s=60.0)) as server:
        loop_engine.step_s = 0.3  # the prefill's step, in which the pause arrives before the token is told
        probe = asyncio.ensure_future(server.http.get("/health_generate"))
        await until(lambda: loop_engine.parts.scheduler.counters.prompt_tokens)
        await server.post("/pause_generation", {"mode": "retract"})
        async with asyncio.timeout(30):
            assert (await probe).status_code == 200


async def test_model_and_server_info_with_their_old_names(engine: ScriptedEngine) -> None:
    arguments = {
        "model": "x",
        "api_key": "s3cret",
        "admin_api_key": "s3cret",
        "max_total_tokens": 5,
        "key": None,
    }
    async with api(engine, server_args=arguments) as server:
        info = (await server.http.get("/model_info")).json()
        assert info == (await server.http.get("/get_model_info")).json()
        assert info["model_path"] == info["tokenizer_path"] == "/models/tiny"
        assert (info["served_model_name"], info["is_generation"]) == (MODEL, True)
        assert info["weight_version"] == "default"
        response = await server.http.get("/server_info")
        assert "s3cret" not in response.text
        assert response.json()["compute"] is None, "no CPU's"
        assert response.json()["max_total_tokens"] == 5
        assert response.json()["internal_states"][0]["page_size"] == 16
        assert (await server.http.get("/get_server_info")).status_code == 200
        version = (await server.http.get("/get_weight_version")).json()
        assert version == {"weight_version": "default"}


async def test_loads_as_gateways_and_trainers_read_them(engine: ScriptedEngine) -> None:
    engine.script.is_stalled = True
    async with api(engine) as server:
        running = asyncio.ensure_future(server.post("/generate", {"text": "a"}))
        await until(lambda: engine.num_running)
        answer = (await server.http.get("/v1/loads?include=core,disagg,queues,memory")).json()
        (load,) = answer["loads"]
        assert (load["num_reqs"], load["num_running_reqs"], load["num_waiting_reqs"]) == (1, 1, 0)
        assert {"memory", "queues", "disaggregation"} <= set(load)
        assert answer["aggregate"]["total_reqs"] == 1
        (core,) = (await server.http.get("/v1/loads?include=core")).json()["loads"]
        assert "memory" not in core
        (old,) = (await server.http.get("/get_load")).json()
        assert (old["num_reqs"], old["num_waiting_reqs"]) == (1, 0)
        running.cancel()


def samples(page: str) -> dict[str, list]:
    found: dict[str, list] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


async def test_metrics_have_the_names_dashboards_query(engine: ScriptedEngine) -> None:
    engine.script.meta = OutputMeta(prompt_tokens=4, cached_device=3)
    async with api(engine) as server:
        await server.post("/generate", {"text": "abcd", "sampling_params": {"max_new_tokens": 5}})
        response = await server.http.get("/metrics")
        head = await server.http.head("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert (head.status_code, head.content) == (200, b"")
    found = samples(response.text)
    for name in ("e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds"):
        assert {f"sglang:{name}_{part}" for part in ("bucket", "sum", "count")} <= set(found)
    gauges = {"num_running_reqs", "num_queue_reqs", "num_retracted_reqs", "num_paused_reqs", "gen_throughput"}
    gauges |= {
        "token_usage",
        "cache_hit_rate",
        "kv_used_tokens",
        "kv_available_tokens",
        "kv_evictable_tokens",
    }
    assert {f"sglang:{name}" for name in gauges} <= set(found)
    values = {name: of_name[0].value for name, of_name in found.items()}
    assert values["sglang:prompt_tokens_total"] == 4
    assert values["sglang:generation_tokens_total"] == 5
    assert values["sglang:cache_hit_rate"] == 0.75
    assert values["sglang:evicted_tokens_total"] == 4
    assert values["sglang:time_to_first_token_seconds_count"] == 1
    cached = {s.labels["cache_source"]: s.value for s in found["sglang:cached_tokens_total"]}
    assert cached == {"device": 3, "host": 0, "storage": 0}
    assert all(s.labels["model_name"] == MODEL for of_name in found.values() for s in of_name)
    pages = {s.labels["owner"]: s.value for s in found["headwater_pages"]}
    assert sum(pages.values()) == values["headwater_page_capacity"] == 64
    assert values["headwater_engine_up"] == 1
    assert {"headwater_cache_generation", "headwater_operations_pending"} <= set(found)


async def test_metrics_do_not_fail_without_an_engine(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        server.state.client.engine_gone(0, "killed")
        response = await server.http.get("/metrics")
    assert response.status_code == 200
    found = samples(response.text)
    assert found["headwater_engine_up"][0].value == 0
    assert "sglang:num_running_reqs" not in found


async def test_a_client_that_leaves_counts_as_aborted(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        body = {"text": "a", "sampling_params": {"stop": "aa", "max_new_tokens": 50}}
        await server.post("/generate", body)
        found = samples((await server.http.get("/metrics")).text)
        assert found["sglang:num_requests_total"][0].value == 1
        assert "sglang:num_aborted_requests_total" not in found or not found["sglang:num_aborted_requests_total"]
        assert found["sglang:generation_tokens_total"][0].value == 2


async def test_request_ids_are_echoed_or_made(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        response = await server.http.get("/ready", headers={"X-Request-ID": "abc"})
        assert response.headers["x-request-id"] == "abc"
        made = {(await server.http.get("/ready")).headers["x-request-id"] for _ in range(3)}
        assert len(made) == 3


async def test_the_openapi_page_describes_the_routes_and_their_ranges(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        schema = (await server.http.get("/openapi.json")).json()
        assert (await server.http.get("/docs")).status_code == 200
    assert schema["openapi"].startswith("3.1")
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            assert route.get("summary"), f"{method} {path} has no summary"
    ids = [route["operationId"] for methods in schema["paths"].values() for route in methods.values()]
    assert len(ids) == len(set(ids))
    flush = {parameter["name"] for parameter in schema["paths"]["/flush_cache"]["get"]["parameters"]}
    assert {"timeout", "mode", "tiers", "hold", "dry_run"} <= flush
    sampling = schema["components"]["schemas"]["SamplingInput"]["properties"]
    assert (sampling["temperature"]["minimum"], sampling["temperature"]["maximum"]) == (0, 100)


async def test_health_generate_of_several_engines_asks_one_that_is_not_held(tmp_path: Path) -> None:
    """One engine asleep must not make the server ill, nor be the one that is tried."""
    with loop_engines(tmp_path, count=2) as engines:
        async with api(*engines) as server:
            engines[0].parts.orders.is_paused = True
            response = await server.http.get("/health_generate")
            assert (response.status_code, response.content) == (200, b"")
            assert engines[1].parts.scheduler.counters.generated_tokens == 1
            engines[1].parts.orders.is_paused = True
            response = await server.http.get("/health_generate")
            assert (response.status_code, response.json()["held_by"]) == (200, ["pause"])
