"""Weight updates, labels and looks at values through HTTP, against the real engine loop."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_under_test import Api, api, error_of, until
from loop_engines import VOCAB_SIZE, LoopEngine, expected, loop_engines, prompt_of

from headwater.simulation.fakes.canary import expected_tokens

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("patience")]
SGLANG_KEYS = {"success", "message", "num_paused_requests"}


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path) as (engine,):
        yield engine


async def generate(server: Api, prompt: list[int], num_tokens: int = 4) -> dict[str, Any]:
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens}}
    response = await server.post("/generate", body)
    assert response.status_code == 200, response.text
    return response.json()


async def update(server: Api, path: str, status: int = 200, **more: Any) -> dict[str, Any]:
    response = await server.post("/update_weights_from_disk", {"model_path": path} | more)
    assert response.status_code == status, response.text
    assert set(response.json()) >= SGLANG_KEYS
    return response.json()


async def test_after_an_update_no_old_kv_matches_though_nobody_flushed(engine: LoopEngine) -> None:
    """The test that fails if `weights_id` is left out of the namespace."""
    prompt = prompt_of(1)
    async with api(engine) as server:
        await generate(server, prompt)
        assert (await generate(server, prompt))["meta_info"]["cached_tokens"] == 36
        # SGLang's fields, all of them, as its clients send them
        answer = await update(
            server,
            "w1",
            load_format=None,
            weight_version="7",
            flush_cache=False,
            keep_pause=False,
            is_async=False,
            torch_empty_cache=True,
            recapture_cuda_graph=False,
            token_step=3,
            manifest=None,
        )
        assert (answer["success"], answer["weights_id"], answer["weight_version"]) == (True, "w1", "7")
        assert answer["generation"] == 1
        assert answer["freed"]["device"]["pages"] >= 10
        after = await generate(server, prompt)
        assert after["meta_info"]["cached_tokens"] == 0
        assert after["meta_info"]["weight_version"] == "7"
        assert after["meta_info"]["cache_generation"] == 1
        assert after["output_ids"] == expected_tokens(prompt, 4, VOCAB_SIZE, "w1")


async def test_the_new_label_is_known_everywhere(engine: LoopEngine) -> None:
    async with api(engine) as server:
        for call in (
            update(server, "w1", weight_version="step-2"),
            server.post("/update_weight_version", {"new_version": "step-2"}),
        ):
            await call
            for path in ("/model_info", "/get_model_info", "/get_weight_version"):
                assert (await server.http.get(path)).json()["weight_version"] == "step-2"
            (state,) = (await server.http.get("/server_info")).json()["internal_states"]
            assert state["weight_version"] == "step-2"
            body = {"prompt": "abcd", "max_tokens": 2}
            assert (await server.post("/v1/completions", body)).json()["metadata"]["weight_version"] == "step-2"
        assert (await update(server, "w2"))["weight_version"] == "step-2", "an update without a label keeps it"
        assert server.state.model is not None
        assert server.state.model.weight_version == "step-2", "also what is told while the engine is silent"


async def test_requests_run_on_across_an_update_and_say_so(engine: LoopEngine) -> None:
    prompt = prompt_of(1)
    async with api(engine) as server:
        engine.step_s = 0.02
        running = asyncio.ensure_future(generate(server, prompt, 60))
        await until(lambda: engine.parts.scheduler.running)
        answer = await update(server, "w1", weight_version="new")
        assert (answer["num_paused_requests"], answer["num_kept"], answer["num_aborted"]) == (1, 1, 0)
        engine.step_s = 0.0
        whole = await running
        spans = whole["meta_info"]["weights_versions"]
        assert [label for label, _ in spans] == ["default", "new"]
        start = spans[1][1]
        assert 0 < start < 60
        assert whole["output_ids"][:start] == expected(prompt, 60)[:start]
        assert (await generate(server, prompt))["meta_info"]["cached_tokens"] == 0, "mixed KV is never shared"


async def test_abort_all_requests_ends_them_first(engine: LoopEngine) -> None:
    async with api(engine) as server:
        engine.step_s = 0.02
        running = [asyncio.ensure_future(generate(server, prompt_of(n), 100)) for n in (1, 2)]
        await until(lambda: len(engine.parts.scheduler.running) == 2)
        answer = await update(server, "w1", abort_all_requests=True)
        assert (answer["num_kept"], answer["num_aborted"]) == (0, 2)
        for task in running:
            assert (await task)["meta_info"]["finish_reason"]["type"] == "abort"


async def test_weights_that_cannot_be_used_change_nothing(engine: LoopEngine) -> None:
    prompt = prompt_of(1)
    async with api(engine) as server:
        await generate(server, prompt)
        answer = await update(server, "corrupt/model", 400, weight_version="9")
        assert (answer["success"], answer["num_paused_requests"]) == (False, 0)
        assert "corrupt/model is broken" in answer["message"]
        assert answer["error"]["param"] == "model_path"
        after = await generate(server, prompt)
        assert after["meta_info"]["weight_version"] == "default"
        assert after["meta_info"]["cached_tokens"] == 36, "the cache of the weights that serve on is still good"
        assert (await server.http.get("/get_weight_version")).json() == {"weight_version": "default"}


async def test_an_update_that_takes_too_long_is_given_up(engine: LoopEngine) -> None:
    engine.runner.weights.num_polls = 10**9
    async with api(engine) as server:
        answer = await update(server, "w1", 400, timeout=0.1)
        assert "not loaded in time" in answer["message"]
        assert (await generate(server, prompt_of(1)))["output_ids"] == expected(prompt_of(1), 4)


async def test_a_pause_outlasts_the_update(engine: LoopEngine) -> None:
    async with api(engine) as server:
        await server.post("/pause_generation", {"mode": "retract"})
        held = asyncio.ensure_future(generate(server, prompt_of(1)))
        await until(lambda: engine.parts.scheduler.waiting)
        assert (await update(server, "w1"))["success"]
        assert not held.done()
        await server.post("/continue_generation")
        assert (await held)["output_ids"] == expected_tokens(prompt_of(1), 4, VOCAB_SIZE, "w1")


async def test_a_new_version_aborts_unless_told_otherwise_and_keeps_the_cache(engine: LoopEngine) -> None:
    async with api(engine) as server:
        await generate(server, prompt_of(9))
        for flag, end in (({}, "abort"), ({"abort_all_requests": False}, "length")):
            engine.step_s = 0.02
            running = asyncio.ensure_future(generate(server, prompt_of(1), 30))
            await until(lambda: engine.parts.scheduler.running)
            response = await server.post("/update_weight_version", {"new_version": "8"} | flag)
            assert response.json()["success"] is True
            assert response.json()["new_version"] == "8"
            assert response.json()["num_aborted"] == (end == "abort")
            engine.step_s = 0.0
            assert (await running)["meta_info"]["finish_reason"]["type"] == end
        assert (await generate(server, prompt_of(9)))["meta_info"]["cached_tokens"] == 36


async def test_a_new_version_under_a_pause_ends_nothing_and_says_so(engine: LoopEngine) -> None:
    async with api(engine) as server:
        engine.step_s = 0.02
        running = asyncio.ensure_future(generate(server, prompt_of(1), 30))
        await until(lambda: engine.parts.scheduler.running)
        await server.post("/pause_generation", {"mode": "in_place"})
        response = await server.post("/update_weight_version", {"new_version": "8"})
        assert (response.status_code, response.json()["num_aborted"]) == (200, 0)
        engine.step_s = 0.0
        await server.post("/continue_generation")
        assert (await running)["output_ids"] == expected(prompt_of(1), 30)


async def test_values_of_a_parameter(engine: LoopEngine) -> None:
    async with api(engine) as server:
        for response in (
            await server.http.get("/get_weights_by_name?name=weight&truncate_size=5"),
            await server.post("/get_weights_by_name", {"name": "weight", "truncate_size": 5}),
        ):
            answer = response.json()
            assert (answer["name"], answer["dtype"], answer["shape"]) == ("weight", "float32", [1])
            assert answer["values"] == [1.0]
        response = await server.http.get("/get_weights_by_name?name=nonsense")
        assert (response.status_code, error_of(response)["param"]) == (404, "name")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/update_weights_from_disk", {}, "model_path"),
        ("/update_weights_from_disk", {"model_path": ""}, "model_path"),
        ("/update_weights_from_disk", {"model_path": 5}, "model_path"),
        ("/update_weights_from_disk", {"model_path": "x", "timeout": -1}, "timeout"),
        ("/update_weights_from_disk", {"model_path": "x", "timeout": "abc"}, "timeout"),
        ("/update_weights_from_disk", {"model_path": "x", "timeout": 3601}, "timeout"),
        ("/update_weights_from_disk", {"model_path": "x", "abort_all_requests": "perhaps"}, "abort_all_requests"),
        ("/update_weights_from_disk", {"model_path": "x", "weight_version": "x" * 300}, "weight_version"),
        ("/update_weight_version", {}, "new_version"),
        ("/update_weight_version", {"new_version": 7}, "new_version"),
        ("/get_weights_by_name", {}, "name"),
        ("/get_weights_by_name", {"name": "x", "truncate_size": 0}, "truncate_size"),
        ("/get_weights_by_name", {"name": "x", "truncate_size": 10**9}, "truncate_size"),
    ],
)
async def test_bad_parameters_are_named(engine: LoopEngine, path: str, body: Any, param: str) -> None:
    async with api(engine) as server:
        response = await server.post(path, body)
        assert response.status_code == 400, response.text
        error = error_of(response)
        assert error["param"] == param
        assert param in error["message"]


async def test_while_the_model_loads_every_route_is_a_503(engine: LoopEngine) -> None:
    async with api(engine, is_ready=False) as server:
        for path, body in (
            ("/update_weights_from_disk", {"model_path": "x"}),
            ("/update_weight_version", {"new_version": "x"}),
            ("/get_weights_by_name", {"name": "x"}),
            ("/release_memory_occupation", {}),
            ("/resume_memory_occupation", {}),
            ("/flush_cache", {}),
        ):
            response = await server.post(path, body)
            assert (response.status_code, error_of(response)["code"]) == (503, "loading"), path


async def test_hashes_of_the_weights_in_sglangs_form(engine: LoopEngine) -> None:
    async with api(engine) as server:
        before = (await server.http.get("/weights_checker")).json()
        assert set(before) >= {"success", "message", "ranks", "per_engine_checksum"}
        assert set(before["ranks"][0]["checksums"]) == {"weight", "bias"}
        await update(server, "w1")
        after = (await server.post("/weights_checker", {"action": "checksum"})).json()
        assert after["weights_id"] == "w1" and after["per_engine_checksum"] != before["per_engine_checksum"]
        assert (await server.post("/weights_checker")).json() == after
        assert (await server.post("/weights_checker", {"action": "reset_tensors"})).status_code == 400
        await server.post("/release_memory_occupation", {"tags": ["weights"], "timeout": 5})
        refused = await server.post("/weights_checker", {})
        assert refused.status_code == 400 and "are released" in refused.json()["message"]
