"""Releasing and resuming memory through HTTP, against the real engine loop."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_under_test import Api, api, error_of, until
from loop_engines import LoopEngine, expected, loop_engines, prompt_of

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("patience")]
RELEASE, RESUME = "/release_memory_occupation", "/resume_memory_occupation"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path) as (engine,):
        yield engine


async def generate(server: Api, prompt: list[int], num_tokens: int = 4) -> dict[str, Any]:
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens}}
    response = await server.post("/generate", body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_requests_queue_while_memory_is_released_and_flush_answers_200(engine: LoopEngine) -> None:
    prompt = prompt_of(1)
    async with api(engine) as server:
        await generate(server, prompt)
        answer = (await server.post(RELEASE, {})).json()
        assert (answer["success"], answer["released"]) == (True, ["kv_cache", "weights"])
        assert answer["num_bytes"] > engine.runner.kv.nbytes - 1
        held = asyncio.ensure_future(generate(server, prompt))
        await until(lambda: engine.parts.scheduler.waiting)
        assert (await server.http.get("/flush_cache")).status_code == 200
        assert (await server.http.get("/flush_cache?timeout=5")).status_code == 200
        (state,) = (await server.http.get("/server_info")).json()["internal_states"]
        assert state["released_memory"] == ["kv_cache", "weights"]
        assert (await server.http.get("/health")).status_code == 200
        assert not held.done()
        assert (await server.post(RESUME, {})).json()["released"] == []
        after = await held
        assert after["meta_info"]["cached_tokens"] == 0, "what was released is gone"
        assert after["output_ids"] == expected(prompt, 4)


async def test_repeats_are_harmless_and_tags_are_released_one_by_one(engine: LoopEngine) -> None:
    async with api(engine) as server:
        for path, tags, released in (
            (RESUME, ["kv_cache"], []),
            (RELEASE, ["kv_cache"], ["kv_cache"]),
            (RELEASE, ["kv_cache"], ["kv_cache"]),
            (RELEASE, ["weights"], ["kv_cache", "weights"]),
            (RESUME, ["weights"], ["kv_cache"]),
            (RESUME, ["weights"], ["kv_cache"]),
            (RELEASE, ["cuda_graph"], ["kv_cache"]),
            (RESUME, ["kv_cache", "cuda_graph"], []),
            (RESUME, [], []),
        ):
            response = await server.post(path, {"tags": tags})
            assert (response.status_code, response.json()["released"]) == (200, released), (path, tags)
        assert (await generate(server, prompt_of(1)))["output_ids"] == expected(prompt_of(1), 4)


async def test_both_methods_and_all_ways_to_say_tags(engine: LoopEngine) -> None:
    async with api(engine) as server:
        for call in (
            server.http.get(RELEASE + "?tags=kv_cache"),
            server.http.get(RELEASE + "?tags=kv_cache,weights"),
            server.http.get(RELEASE + "?tags=kv_cache&tags=weights"),
            server.http.get(RELEASE),
            server.http.post(RELEASE),
            server.http.post(RELEASE, json={"tags": None}),
            server.http.post(RELEASE, json={"tags": "kv_cache"}),
        ):
            released = (await call).json()["released"]
            assert released[0] == "kv_cache"
            assert (await server.http.get(RESUME)).json()["released"] == []


async def test_a_busy_engine_refuses_with_blockers_or_waits(engine: LoopEngine) -> None:
    async with api(engine) as server:
        engine.step_s = 0.02
        running = asyncio.ensure_future(generate(server, prompt_of(1), 300))
        await until(lambda: engine.parts.scheduler.running)
        for body in ({}, {"timeout": 0.1}):
            response = await server.post(RELEASE, body)
            assert response.status_code == 400
            assert error_of(response)["blockers"] == {"running": 1}
            assert "not idle" in error_of(response)["message"]
        pending = asyncio.ensure_future(server.post(RELEASE, {"timeout": 30}))
        await until(lambda: engine.parts.control.num_pending)
        late = asyncio.ensure_future(generate(server, prompt_of(2)))  # must not starve the release
        await until(lambda: engine.parts.scheduler.waiting)
        engine.step_s = 0.0
        assert (await pending).status_code == 200
        assert (await running)["output_ids"] == expected(prompt_of(1), 300)
        assert not late.done()
        await server.post(RESUME)
        assert (await late)["output_ids"] == expected(prompt_of(2), 4)


async def test_weights_are_read_again_before_anything_runs(engine: LoopEngine) -> None:
    async with api(engine) as server:
        await server.post(RELEASE, {"tags": ["weights"]})
        assert engine.runner.weights.is_released
        response = await server.http.get("/get_weights_by_name?name=weight")
        assert response.status_code == 404
        assert "released" in error_of(response)["message"]
        await server.post(RESUME, {"tags": ["weights"]})
        assert not engine.runner.weights.is_released
        assert (await generate(server, prompt_of(1)))["output_ids"] == expected(prompt_of(1), 4)


async def test_new_weights_take_the_place_of_released_ones(engine: LoopEngine) -> None:
    """A resume after them would read the same files a second time, and need their memory twice."""
    async with api(engine) as server:
        await server.post(RELEASE, {})
        body = {"model_path": "w1", "weight_version": "1"}
        assert (await server.post("/update_weights_from_disk", body)).status_code == 200
        assert not engine.runner.weights.is_released
        answer = (await server.post(RESUME, {"tags": ["weights"]})).json()
        assert answer["released"] == ["kv_cache"]
        assert (await server.post(RESUME, {})).json()["released"] == []
        assert (await generate(server, prompt_of(1)))["meta_info"]["weight_version"] == "1"
        assert engine.runner.weights.current == "w1"


@pytest.mark.parametrize("path", [RELEASE, RESUME])
async def test_bad_parameters_are_named(engine: LoopEngine, path: str) -> None:
    async with api(engine) as server:
        for body, param in (
            ({"tags": ["everything"]}, "tags"),
            ({"tags": 5}, "tags"),
            ({"timeout": -1}, "timeout"),
            ({"timeout": "abc"}, "timeout"),
            ({"timeout": 3601}, "timeout"),
        ):
            response = await server.post(path, body)
            assert (response.status_code, error_of(response)["param"]) == (400, param), body
        response = await server.http.get(path + "?timeout=nan")
        assert (response.status_code, error_of(response)["param"]) == (400, "timeout")


async def test_control_keys_guard_weights_and_memory(engine: LoopEngine) -> None:
    """Whoever may generate may not look at the weights, change them, or stop the server."""
    async with api(engine, api_key="user", admin_api_key="admin") as server:
        for method, path in (
            ("POST", RELEASE),
            ("POST", RESUME),
            ("POST", "/update_weights_from_disk"),
            ("POST", "/update_weight_version"),
            ("POST", "/get_weights_by_name"),
            ("POST", "/pause_generation"),
            ("POST", "/continue_generation"),
            ("GET", "/control/operations"),
            ("GET", "/control/blockers"),
        ):
            for key, status in ((None, 401), ("user", 403)):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                assert (await server.http.request(method, path, headers=headers)).status_code == status, path
        headers = {"authorization": "Bearer user"}
        assert (await server.http.get("/get_weight_version", headers=headers)).status_code == 200


async def test_files_that_changed_since_the_release_are_a_409_or_lose_their_label(engine: LoopEngine) -> None:
    async with api(engine) as server:
        await server.post("/release_memory_occupation", {})
        engine.runner.weights.on_disk = "w9"
        response = await server.post("/resume_memory_occupation", {})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (409, "accept_changed_weights")
        assert "w0 was released, w9 found" in error["message"] and "nothing was resumed" in error["message"]
        (state,) = (await server.http.get("/server_info")).json()["internal_states"]
        assert state["released_memory"] == ["kv_cache", "weights"]
        response = await server.post("/generate", {"input_ids": prompt_of(1)})
        assert response.status_code == 503, "nobody waits for weights that do not come"
        assert "not resumed: w0 was released, w9 found" in error_of(response)["message"]
        response = await server.post("/resume_memory_occupation", {"accept_changed_weights": True})
        answer = response.json()
        assert response.status_code == 200, answer
        assert (answer["weights_id"], answer["weight_version"], answer["has_changed_weights"]) == ("w9", "", True)
        assert (await server.http.get("/get_weight_version")).json() == {"weight_version": ""}
        assert (await server.post("/generate", {"input_ids": prompt_of(1)})).status_code == 200
        response = await server.post("/resume_memory_occupation", {"accept_changed_weights": "perhaps"})
        assert (response.status_code, error_of(response)["param"]) == (400, "accept_changed_weights")
