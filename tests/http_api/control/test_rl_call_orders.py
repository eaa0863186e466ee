"""The call orders of slime, miles, verl and AReaL, as those trainers send them, with rollouts in flight.

Each of them polls `/flush_cache` until it answers 200; here the first answer must do.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_under_test import Api, api, until
from loop_engines import VOCAB_SIZE, LoopEngine, expected, loop_engines, prompt_of

from headwater.simulation.fakes.canary import expected_tokens

pytestmark = pytest.mark.anyio
NUM_ROLLOUTS = 6
LONG = 60


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path, max_running=4) as (engine,):
        yield engine


def rollout_body(prompt: list[int], num_tokens: int) -> dict[str, Any]:
    """As slime and miles send it, with the fields that only they use."""
    return {
        "input_ids": prompt,
        "sampling_params": {
            "temperature": 0,
            "top_p": 1.0,
            "top_k": -1,
            "max_new_tokens": num_tokens,
            "stop": None,
            "stop_token_ids": None,
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
            "sampling_seed": 42,
            "custom_params": {"anything": 1},
        },
        "return_logprob": True,
    }


async def rollout(server: Api, name: int, num_tokens: int = LONG) -> dict[str, Any]:
    response = await server.post("/generate", rollout_body(prompt_of(name), num_tokens))
    assert response.status_code == 200, response.text
    answer = response.json()
    logprobs = answer["meta_info"]["output_token_logprobs"]
    assert [entry[1] for entry in logprobs] == answer["output_ids"], "trainers read the tokens from here"
    return answer


async def rollouts(server: Api, engine: LoopEngine) -> list["asyncio.Future[dict[str, Any]]"]:
    """Requests in flight: more than fit the batch, so that some are still queued."""
    engine.step_s = 0.02
    tasks = [asyncio.ensure_future(rollout(server, name)) for name in range(NUM_ROLLOUTS)]
    await until(lambda: len(engine.parts.scheduler.running) == 4 and len(engine.parts.scheduler.waiting) == 2)
    return tasks


async def post(server: Api, path: str, body: Any) -> Any:
    response = await server.post(path, body)
    assert response.status_code == 200, (path, response.text)
    return response.json() if response.content else None


async def flush_once(server: Api, method: str = "GET", **request: Any) -> None:
    response = await server.http.request(method, "/flush_cache", **request)
    assert (response.status_code, response.text[:14]) == (200, "Cache flushed."), response.text


async def finish_types(tasks: list["asyncio.Future[dict[str, Any]]"]) -> list[str]:
    return [(await task)["meta_info"]["finish_reason"]["type"] for task in tasks]


async def assert_fresh(server: Api, engine: LoopEngine, weights: str, version: str) -> None:
    """What is generated now comes from the new weights alone."""
    engine.step_s = 0.0
    for name in range(NUM_ROLLOUTS):
        answer = await rollout(server, name, 4)
        assert answer["meta_info"]["weight_version"] == version
        assert answer["output_ids"] == expected_tokens(prompt_of(name), 4, VOCAB_SIZE, weights)


async def test_slime(engine: LoopEngine) -> None:
    async with api(engine) as server:
        assert (await server.http.get("/health_generate")).status_code == 200
        tasks = await rollouts(server, engine)
        # partial rollout: abort all, then look at the loads until nothing is left
        await post(server, "/abort_request", {"abort_all": True})
        loads = (await server.http.get("/v1/loads?include=core")).json()["loads"]
        assert [load["num_reqs"] for load in loads] == [0], "one abort must do, without a second round"
        assert await finish_types(tasks) == ["abort"] * NUM_ROLLOUTS
        # update
        tasks = await rollouts(server, engine)
        assert (await post(server, "/pause_generation", {}))["status"] == "ok"
        await flush_once(server)
        body = {"model_path": "w1", "flush_cache": False, "weight_version": "1"}
        assert (await post(server, "/update_weights_from_disk", body))["success"] is True
        await post(server, "/continue_generation", {})
        assert await finish_types(tasks) == ["abort"] * NUM_ROLLOUTS
        assert (await server.http.get("/get_weight_version")).json() == {"weight_version": "1"}
        await assert_fresh(server, engine, "w1", "1")
        # offload and onload, as slime's own patch of its server wants it: repeats are harmless
        await flush_once(server)
        for _ in range(2):
            await post(server, "/release_memory_occupation", {})
        for tags in (["weights"], ["kv_cache", "cuda_graph"], ["kv_cache"]):
            await post(server, "/resume_memory_occupation", {"tags": tags})
        await assert_fresh(server, engine, "w1", "1")


@pytest.mark.parametrize("mode", ["retract", "in_place"])
async def test_miles(engine: LoopEngine, mode: str) -> None:
    async with api(engine) as server:
        tasks = await rollouts(server, engine)
        await post(server, "/pause_generation", {"mode": mode})
        if mode != "in_place":
            await flush_once(server)
        body = {"model_path": "w1", "flush_cache": False}
        assert (await post(server, "/update_weights_from_disk", body))["success"] is True
        body = {"new_version": "1", "abort_all_requests": False}
        assert (await post(server, "/update_weight_version", body))["new_version"] == "1"
        await post(server, "/continue_generation", {})
        engine.step_s = 0.0
        assert await finish_types(tasks) == ["length"] * NUM_ROLLOUTS, "nobody was refused or lost"
        assert (await server.http.get("/model_info")).json()["weight_version"] == "1"
        for _ in range(3):  # before each batch that is scored
            await flush_once(server, "POST", json={})
        await assert_fresh(server, engine, "w1", "1")
        long = asyncio.ensure_future(
            server.post("/generate", rollout_body(prompt_of(9), 300) | {"rid": "lora-a_1"})
        )
        engine.step_s = 0.02
        await until(lambda: engine.parts.scheduler.running)
        await post(server, "/abort_request", {"rid": "lora-a_", "prefix": True})
        assert (await long).json()["meta_info"]["finish_reason"]["type"] == "abort"


async def test_verl(engine: LoopEngine) -> None:
    """The weights come from disk here; verl itself sends them as tensors."""
    async with api(engine) as server:
        assert (await server.http.get("/health_generate")).status_code == 200
        for step in (1, 2):
            await flush_once(server)
            await post(server, "/release_memory_occupation", {"tags": ["kv_cache", "weights"]})
            await post(server, "/resume_memory_occupation", {"tags": ["weights"]})
            body = {"model_path": f"w{step}", "weight_version": str(step)}
            assert (await post(server, "/update_weights_from_disk", body))["success"] is True
            await flush_once(server)
            await post(server, "/resume_memory_occupation", {"tags": ["kv_cache"]})
            await assert_fresh(server, engine, f"w{step}", str(step))
        tasks = await rollouts(server, engine)
        await post(server, "/abort_request", {"rid": "", "abort_all": True})
        assert await finish_types(tasks) == ["abort"] * NUM_ROLLOUTS


async def test_areal(engine: LoopEngine) -> None:
    """No flush call at all: the update itself must drop what the old weights computed."""
    async with api(engine) as server:
        assert (await server.http.get("/health")).status_code == 200
        for name in range(NUM_ROLLOUTS):
            await rollout(server, name, 4)
        tasks = await rollouts(server, engine)
        await post(server, "/pause_generation", {})
        body = {"model_path": "w1", "abort_all_requests": True}
        assert (await post(server, "/update_weights_from_disk", body))["success"] is True
        await post(server, "/continue_generation", {})
        engine.step_s = 0.0
        for name, task in enumerate(tasks):
            first = await task
            assert first["meta_info"]["finish_reason"]["type"] == "abort"
            done = first["output_ids"]
            assert done == expected(prompt_of(name), LONG)[: len(done)]
            # it sends prompt and tokens so far again, and goes on with the new weights
            body = rollout_body(prompt_of(name) + done, LONG - len(done))
            again = (await server.post("/generate", body)).json()
            assert again["output_ids"] == expected_tokens(prompt_of(name) + done, LONG - len(done), VOCAB_SIZE, "w1")
            assert again["meta_info"]["cached_tokens"] == 0


async def test_an_abort_by_prefix_keeps_the_tokens_so_far_and_other_requests(engine: LoopEngine) -> None:
    """Of one adapter's rollouts, as miles ends them: what was sampled is in the answers, to the token."""
    async with api(engine) as server:
        engine.step_s = 0.02
        names = {"lora-a_1": 1, "lora-a_2": 2, "lora-b_1": 3}
        bodies = [rollout_body(prompt_of(number), 30) | {"rid": name} for name, number in names.items()]
        tasks = [asyncio.ensure_future(server.post("/generate", body)) for body in bodies]
        await until(lambda: sum(it.num_outputs >= 3 for it in engine.parts.scheduler.running) == len(names))
        await post(server, "/abort_request", {"rid": "lora-a_", "prefix": True})
        engine.step_s = 0.0
        *ended, kept = [(await task).json() for task in tasks]
        assert kept["output_ids"] == expected(prompt_of(3), 30)
        for number, answer in enumerate(ended, 1):
            ids, meta = answer["output_ids"], answer["meta_info"]
            assert (meta["finish_reason"]["type"], meta["completion_tokens"]) == ("abort", len(ids))
            assert 3 <= len(ids) < 30 and ids == expected(prompt_of(number), 30)[: len(ids)]
            assert [entry[1] for entry in meta["output_token_logprobs"]] == ids
