"""Silent engines: every call is answered within its deadline and a second, and what was told as not done is not."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_under_test import Api, api, error_of, until
from loop_engines import LoopEngine, expected, loop_engines, prompt_of

from processes import Stalls

pytestmark = pytest.mark.anyio
JSON = {"accept": "application/json"}
SLACK_S = 1.5  # the promise is a second; the machine may be busy
CALLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flush": ("POST", "/flush_cache", {"timeout": 0.5}),
    "flush now": ("POST", "/flush_cache", {"timeout": 0.5, "mode": "now"}),
    "update": ("POST", "/update_weights_from_disk", {"timeout": 0.5, "model_path": "w9", "weight_version": "late"}),
    "release": ("POST", "/release_memory_occupation", {"timeout": 0.5}),
    "resume": ("POST", "/resume_memory_occupation", {"timeout": 0.5}),
    "clear": ("POST", "/hicache/storage-backend/clear?timeout=0.5", {}),
}


def picture(engine: LoopEngine) -> Any:
    """What a call could have changed."""
    parts = engine.parts
    control = parts.control
    return parts.scheduler.weights_id, parts.scheduler.weight_version, control.is_paused, control.released_memory


@asynccontextmanager
async def frozen(server: Api, *engines: LoopEngine) -> AsyncIterator[None]:
    for engine in engines:
        await asyncio.to_thread(engine.freeze)
    try:
        yield
    finally:
        for engine in engines:
            engine.thaw()


async def ask(server: Api, name: str) -> tuple[httpx.Response, float]:
    """The answer, and how long it took while this process ran."""
    method, path, body = CALLS[name]
    began_s = time.monotonic()
    with Stalls() as stalls:
        response = await server.http.request(method, path, json=body, headers=JSON)
        took_s = time.monotonic() - began_s
    return response, took_s - stalls.lost_s


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[LoopEngine]]:
    with loop_engines(tmp_path, count=2) as engines:
        yield engines


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "clear"])
async def test_a_silent_engine_is_told_in_time_and_does_nothing_later(tmp_path: Path, name: str, count: int) -> None:
    with loop_engines(tmp_path, count=count) as engines:
        async with api(*engines) as server:
            before = [picture(engine) for engine in engines]
            generations = [engine.parts.cache.generation for engine in engines]
            async with frozen(server, engines[-1]):
                response, took_s = await ask(server, name)
                assert took_s < 0.5 + SLACK_S
                assert response.status_code == 504, response.text
            await until(lambda: not any(engine.parts.control.num_pending for engine in engines))
            await asyncio.sleep(0.1)
            assert [picture(engine) for engine in engines] == before, "it was carried out after all"
            assert engines[-1].parts.cache.generation == generations[-1]
            assert (await server.http.get("/health")).status_code == 200


async def test_without_a_timeout_a_busy_engine_is_waited_for(engines: list[LoopEngine]) -> None:
    """A step on a CPU may take seconds: who names no limit gets an answer, not a 504."""
    async with api(*engines) as server:
        async with frozen(server, engines[1]):
            flush = asyncio.ensure_future(server.http.post("/flush_cache", headers=JSON))
            pause = asyncio.ensure_future(server.post("/pause_generation", {"mode": "retract"}))
            await asyncio.sleep(1.3)
            assert not flush.done() and not pause.done()
            assert not engines[0].parts.control.is_paused, "all or none"
        assert (await flush).status_code == 200
        assert (await pause).status_code == 200
        assert all(engine.parts.control.is_paused for engine in engines)


async def test_an_engine_that_misses_the_decision_is_named_gets_no_requests_and_catches_up(
    engines: list[LoopEngine],
) -> None:
    async with api(*engines) as server:
        control = engines[1].parts.control
        on_commit = control._commit

        def die_away(*_: Any) -> None:
            engines[1]._wire.may_go_on.clear()

        control._commit = die_away  # type: ignore[method-assign]
        body = {"model_path": "w1", "weight_version": "1", "timeout": 0.5}
        began_s = time.monotonic()
        with Stalls() as stalls:
            response = await server.post("/update_weights_from_disk", body)
        assert time.monotonic() - began_s - stalls.lost_s < 0.5 + SLACK_S
        assert response.status_code == 202, response.text
        first, second = response.json()["engines"]
        assert (first["weights_id"], second["pending"]) == ("w1", True)
        for n in range(3):
            prompt = {"input_ids": prompt_of(n), "sampling_params": {"temperature": 0, "max_new_tokens": 3}}
            meta = (await server.post("/generate", prompt)).json()["meta_info"]
            assert (meta["dp_rank"], meta["weight_version"]) == (0, "1")
        refused = await server.post("/generate", prompt | {"routed_dp_rank": 1})
        assert (refused.status_code, error_of(refused)["code"]) == (503, "engine_out")
        health = await server.http.get("/health")
        assert health.status_code == 200
        assert "has not confirmed" in health.json()["engines_out"][0]["message"]
        states = (await server.http.get("/server_info")).json()["internal_states"]
        assert [state["success"] for state in states] == [True, False]
        control._commit = on_commit  # type: ignore[method-assign]
        engines[1].thaw()
        await until(lambda: not server.state.client.engines_out, 10)
        assert [picture(engine)[:2] for engine in engines] == [("w1", "1")] * 2
        assert (await server.http.get("/health")).content == b""


async def test_no_request_goes_to_an_engine_that_could_not_be_put_to_sleep_with_the_others(
    engines: list[LoopEngine],
) -> None:
    """One busy engine refuses the release: the other one does not sleep either, and takes requests."""
    async with api(*engines) as server:
        engines[1].step_s = 0.02
        body = {"input_ids": prompt_of(1), "sampling_params": {"temperature": 0, "max_new_tokens": 200}}
        busy = asyncio.ensure_future(server.post("/generate", body | {"routed_dp_rank": 1}))
        await until(lambda: engines[1].parts.scheduler.running)
        response = await server.post("/release_memory_occupation", {"tags": ["kv_cache"]})
        assert response.status_code == 400
        assert "nothing was changed on any engine" in error_of(response)["message"]
        other = {"input_ids": prompt_of(2), "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
        answer = await asyncio.wait_for(server.post("/generate", other), 5)
        assert answer.json()["output_ids"] == expected(prompt_of(2), 4)
        engines[1].step_s = 0.0
        await busy


async def test_what_waits_for_memory_shows(engines: list[LoopEngine]) -> None:
    async with api(*engines) as server:
        assert (await server.post("/release_memory_occupation", {})).status_code == 200
        body = {"input_ids": prompt_of(1), "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
        waiting = [asyncio.ensure_future(server.post("/generate", body)) for _ in range(3)]
        await until(lambda: sum(len(engine.parts.scheduler.waiting) for engine in engines) == 3)
        facts = (await server.http.get("/control/blockers")).json()
        assert (facts["is_idle"], facts["blockers"]) == (False, {"waiting_for_memory": 3})
        assert (await server.http.get("/control/operations")).json() == {"operations": [], "waiting_for_memory": 3}
        flush = await server.http.post("/flush_cache", headers=JSON)
        assert flush.status_code == 200, "a flush does not wait for what cannot run"
        assert (await server.post("/resume_memory_occupation", {})).status_code == 200
        assert all(answer.status_code == 200 for answer in await asyncio.gather(*waiting))
        assert (await server.http.get("/control/operations")).json() == {"operations": []}


async def test_a_restarted_engine_gets_its_pins_and_the_rest_before_it_serves(
    engines: list[LoopEngine], tmp_path: Path
) -> None:
    async with api(*engines) as server:
        pinned = (await server.post("/cache/pin", {"input_ids": prompt_of(3), "ttl_s": 100})).json()
        assert pinned["pin_id"] == "0.pin-1,1.pin-1"
        await server.post("/update_weight_version", {"new_version": "7"})
        await server.post("/pause_generation", {"mode": "retract"})
        client = server.state.client
        client.engine_gone(1, "killed")
        with LoopEngine(f"ipc://{tmp_path}/again.sock") as again:
            client.engine_back(1, again.endpoint)
            await until(lambda: not client.engines_out, 10)
            assert again.parts.control.is_paused
            assert again.parts.scheduler.weight_version == "7"
            assert again.parts.pinning.has("pin-1")
            await server.post("/continue_generation")
            assert (await server.http.delete(f"/cache/pin/{pinned['pin_id']}")).status_code == 200
            assert not again.parts.pinning.has("pin-1")
            client.engine_gone(1, "end of the test")
