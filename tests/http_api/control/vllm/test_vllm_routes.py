"""vLLM's control routes as its trainers call them, against the real engine loop: transfers, sleep, RPC, cache."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_under_test import Api, api, until
from loop_engines import VOCAB_SIZE, LoopEngine, expected, loop_engines, prompt_of

from headwater.devices.safetensors_header import ITEM_BYTES, build_header
from headwater.http_api.control.vllm import transfer_routes
from headwater.http_api.control.vllm.rpc_routes import METHODS
from headwater.messages.receiving import VLLM, ReceiveBucket
from headwater.simulation.fakes.canary import expected_tokens
from headwater.transports.receivers import GroupSpec, ReceiverFailed

pytestmark = pytest.mark.anyio
GROUP = {"master_address": "127.0.0.1", "master_port": 51216, "rank_offset": 1, "world_size": 2}
TENSORS = {"names": ["weight", "bias"], "dtype_names": ["float32", "bfloat16"], "shapes": [[1], [2]]}
SLEEP, WAKE = "/sleep", "/wake_up"


class FakeGroups:
    """In place of processes with PyTorch: whatever is asked for arrives, as zeros."""

    def __init__(self) -> None:
        self.joined: list[GroupSpec] = []
        self.members: set[str] = set()
        self.received: list[ReceiveBucket] = []
        self.is_silent = False

    async def join(self, spec: GroupSpec, *, timeout_s: float) -> None:
        assert spec.name not in self.members
        self.joined.append(spec)
        self.members.add(spec.name)

    async def destroy(self, name: str) -> bool:
        was_there = name in self.members
        self.members.discard(name)
        return was_there

    async def receive(self, name: str, bucket: ReceiveBucket, *, timeout_s: float) -> None:
        if name not in self.members or self.is_silent:
            await self.destroy(name)
            raise ReceiverFailed(f"the trainer sent nothing more; the group {name!r} has ended")
        self.received.append(bucket)
        header = build_header(zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True))
        sizes = (math.prod(s) * ITEM_BYTES[d] for d, s in zip(bucket.dtypes, bucket.shapes, strict=True))
        if bucket.path:
            Path(bucket.path).write_bytes(header + bytes(sum(sizes)))  # noqa: ASYNC240

    async def drop_from_gpu(self) -> None: ...

    async def close(self) -> None: ...


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path) as (engine,):
        yield engine


def with_groups(server: Api) -> FakeGroups:
    groups = server.app.state.services.weights.groups = FakeGroups()
    return groups


async def ok(server: Api, path: str, body: Any = None) -> Any:
    response = await server.post(path, body)
    assert response.status_code == 200, (path, response.text)
    return response.json()


async def generate(server: Api, name: int, num_tokens: int = 4) -> dict[str, Any]:
    body = {"input_ids": prompt_of(name), "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens}}
    return await ok(server, "/generate", body)


async def weights_id(server: Api) -> str:
    return (await server.http.get("/server_info")).json()["internal_states"][0]["weights_id"]


async def test_the_calls_of_trl(engine: LoopEngine) -> None:
    """Names, order and shapes of trl's client; nothing is visible before the end, everything after it."""
    async with api(engine) as server:
        groups = with_groups(server)
        config = (await server.http.get("/server_info?config_format=json")).json()["vllm_config"]
        assert config["weight_transfer_config"] == {"backend": "gloo"}
        assert config["model_config"]["logprobs_mode"] == "raw_logprobs"
        assert "vllm_config" not in (await server.http.get("/server_info")).json()
        assert (await server.http.get("/get_world_size")).json() == {"world_size": 1}
        await ok(server, "/init_weight_transfer_engine", {"init_info": GROUP | {"packed": True}})
        assert (groups.joined[0].backend, groups.joined[0].num_members) == ("gloo", 1)
        for step in range(3):
            before = await weights_id(server)
            await ok(server, "/start_weight_update", {})
            await ok(server, "/update_weights", {"update_info": TENSORS})
            assert groups.received[-1].piece_bytes == 1 << 30, "packed, as the group was made"
            assert await weights_id(server) == before
            done = await ok(server, "/finish_weight_update", {"weight_version": str(step)})
            assert done["weights_id"] != before
            assert (await ok(server, "/reset_prefix_cache"))["success"] is True
            answer = await generate(server, step)
            assert answer["output_ids"] == expected_tokens(prompt_of(step), 4, VOCAB_SIZE, done["weights_id"])
            assert answer["meta_info"]["weight_version"] == str(step)


async def test_on_gpus_the_ranks_meet_as_vllms_do(engine: LoopEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's own way of NCCL, the trainer and the server would wait for each other until their deadlines."""
    monkeypatch.setattr(transfer_routes, "backend_of", lambda _: "nccl")
    async with api(engine) as server:
        groups = with_groups(server)
        await ok(server, "/init_weight_transfer_engine", {"init_info": GROUP | {"packed": True}})
        assert (groups.joined[0].backend, groups.joined[0].rank_offset, groups.joined[0].num_members) == (VLLM, 1, 1)


async def test_tensors_stay_on_a_gpu_only_beside_the_room_for_the_engines_own_copy(engine: LoopEngine) -> None:
    """The receiving process compares with what is free: all of the model, in the format in which it is computed."""
    for stages, spare_bytes in ((True, 3 * 4 + (1 << 30)), (False, -1)):
        async with api(engine, stages_on_gpu=stages) as server:
            groups = with_groups(server)
            await ok(server, "/init_weight_transfer_engine", {"init_info": GROUP})
            await ok(server, "/update_weights", {"update_info": TENSORS})
            assert groups.received[-1].spare_bytes == spare_bytes


async def test_ranks_of_all_engines(tmp_path: Path) -> None:
    with loop_engines(tmp_path, 2) as engines:
        async with api(*engines, server_args={"tp_size": 2}) as server:
            assert (await server.http.get("/get_world_size")).json() == {"world_size": 4}
            assert (await server.http.get("/get_world_size?include_dp=false")).json() == {"world_size": 2}
            body = {"init_info": GROUP | {"world_size": 3}}
            response = await server.post("/init_weight_transfer_engine", body)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "rank_offset")


async def test_how_tensors_are_joined_is_the_calls_or_the_groups(engine: LoopEngine) -> None:
    async with api(engine) as server:
        groups = with_groups(server)
        for of_group, of_call, size in (
            ({}, {}, 0),
            ({}, {"packed": True}, 1 << 30),
            ({}, {"packed": True, "packed_buffer_size_bytes": 8}, 8),
            ({"packed": True, "packed_buffer_size_bytes": 9}, {}, 9),
            ({"packed": True}, {"packed": False}, 0),
        ):
            await ok(server, "/init_weight_transfer_engine", {"init_info": GROUP | of_group})
            await ok(server, "/update_weights", {"update_info": TENSORS | of_call})
            assert (groups.received[-1].piece_bytes, groups.received[-1].is_flattened) == (size, size > 0)


async def test_a_new_trainer_replaces_one_that_died_in_an_update(engine: LoopEngine) -> None:
    async with api(engine) as server:
        groups = with_groups(server)
        await ok(server, "/init_weight_transfer_engine", {"init_info": GROUP})
        before = await weights_id(server)
        await ok(server, "/start_weight_update", {})
        groups.is_silent = True
        refused = await server.post("/update_weights", {"update_info": TENSORS})
        assert refused.status_code == 400 and "has ended" in refused.json()["error"]["message"]
        assert (await server.post("/start_weight_update", {})).status_code == 400, "its update is still open"
        groups.is_silent = False
        await ok(server, "/init_weight_transfer_engine", {"init_info": GROUP})
        assert (await generate(server, 1))["output_ids"] == expected(prompt_of(1), 4)
        assert await weights_id(server) == before
        await ok(server, "/start_weight_update", {})
        await ok(server, "/update_weights", {"update_info": TENSORS})
        assert (await ok(server, "/finish_weight_update"))["weights_id"] != before
        # a bracket that was opened by its own name belongs to somebody else
        opened = await ok(server, "/begin_weight_update", {})
        await ok(server, "/init_weight_transfer_engine", {"init_info": GROUP})
        assert (await server.post("/start_weight_update", {})).status_code == 400
        await ok(server, "/abort_weight_update", {"transfer_id": opened["transfer_id"]})


async def test_what_is_not_honoured_is_named(engine: LoopEngine) -> None:
    async with api(engine) as server:
        with_groups(server)
        for path, body, param in (
            ("/init_weight_transfer_engine", {}, "init_info"),
            ("/init_weight_transfer_engine", {"init_info": GROUP | {"world_size": 1}}, "init_info.world_size"),
            ("/start_weight_update", {"is_checkpoint_format": False}, "is_checkpoint_format"),
            ("/update_weights", {}, "update_info"),
            ("/update_weights", {"update_info": TENSORS | {"names": ["weight"]}}, "update_info"),
            ("/reset_prefix_cache?reset_running_requests=true", None, "reset_running_requests"),
            ("/reset_prefix_cache?reset_external=1", None, "reset_external"),
            ("/sleep?level=0", None, "level"),
            ("/sleep?level=3", None, "level"),
            ("/sleep?mode=keep", None, "mode"),
            ("/sleep?timeout=-1", None, "timeout"),
            ("/wake_up?tags=scheduling", None, "tags"),
            ("/collective_rpc", {"method": "execute_model"}, "method"),
            ("/collective_rpc", {"method": "sleep", "kwargs": {"levle": 1}}, "kwargs"),
            ("/collective_rpc", {"method": "sleep", "args": [1, 2]}, "args"),
            ("/collective_rpc", {"method": "sleep", "args": [1], "kwargs": {"level": 1}}, "kwargs"),
            ("/collective_rpc", {"method": "sleep", "kwargs": {"level": True}}, "kwargs"),
            ("/collective_rpc", {"method": "wake_up", "kwargs": {"tags": "weights"}}, "kwargs"),
            ("/collective_rpc", {"method": "update_weights"}, "update_info"),
            ("/collective_rpc", {"method": "update_weight_version"}, "new_version"),
        ):
            response = await server.post(path, body)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, param), (path, body, response.text)
        refused = await server.post("/collective_rpc", {"method": "execute_model"})
        assert all(name in refused.json()["error"]["message"] for name in METHODS)
        assert (await server.http.get("/is_sleeping")).json() == {"is_sleeping": False}


async def test_sleep_and_wake_in_every_order(engine: LoopEngine) -> None:
    """Repeated and crossed with SGLang's calls: what counts is what is released, not who said it."""
    async with api(engine) as server:

        async def sleeps(path: str, *, is_sleeping: bool, body: Any = None) -> None:
            await ok(server, path, body)
            assert (await server.http.get("/is_sleeping")).json() == {"is_sleeping": is_sleeping}

        await sleeps(WAKE, is_sleeping=False)
        for level in (1, 2):
            await generate(server, level)
            for _ in range(2):
                await sleeps(f"{SLEEP}?level={level}", is_sleeping=True)
            await sleeps(f"{WAKE}?tags=weights", is_sleeping=True)
            await sleeps(f"{WAKE}?tags=weights", is_sleeping=True)
            await sleeps(f"{WAKE}?tags=kv_cache", is_sleeping=False)
            await sleeps(WAKE, is_sleeping=False)
            assert (await generate(server, level))["meta_info"]["cached_tokens"] == 0
        await sleeps("/release_memory_occupation", is_sleeping=True, body={"tags": ["kv_cache"]})
        await sleeps(SLEEP, is_sleeping=True)
        await sleeps("/resume_memory_occupation", is_sleeping=False, body={})
        await sleeps(SLEEP, is_sleeping=True)
        await sleeps("/collective_rpc", is_sleeping=False, body={"method": "wake_up"})
        assert (await generate(server, 3))["output_ids"] == expected(prompt_of(3), 4)


async def test_sleep_ends_what_runs_and_holds_what_comes(engine: LoopEngine) -> None:
    async with api(engine) as server:
        engine.step_s = 0.01
        running = asyncio.ensure_future(generate(server, 1, 300))
        await until(lambda: engine.parts.scheduler.running)
        await ok(server, SLEEP)
        assert (await running)["meta_info"]["finish_reason"]["type"] == "abort"
        held = asyncio.ensure_future(generate(server, 2))
        await until(lambda: engine.parts.scheduler.waiting)
        await ok(server, WAKE)
        assert (await held)["output_ids"] == expected(prompt_of(2), 4)


async def test_sleep_can_wait_for_what_runs(engine: LoopEngine) -> None:
    async with api(engine) as server:
        engine.step_s = 0.01
        running = asyncio.ensure_future(generate(server, 1, 30))
        await until(lambda: engine.parts.scheduler.running)
        assert (await server.post(f"{SLEEP}?mode=wait&timeout=0")).status_code == 400
        await ok(server, f"{SLEEP}?mode=wait")
        assert (await running)["output_ids"] == expected(prompt_of(1), 30)
        await ok(server, WAKE)


async def test_the_methods_of_workers(engine: LoopEngine) -> None:
    """As vLLM's page on sleep mode has them: wake the weights, load them again, then the cache."""
    async with api(engine) as server:
        with_groups(server)

        async def rpc(method: str, *args: Any, **kwargs: Any) -> None:
            body = {"method": method, "args": list(args), "kwargs": kwargs}
            assert await ok(server, "/collective_rpc", body) == {"results": [None]}

        await rpc("init_weight_transfer_engine", init_info=GROUP)
        await rpc("start_weight_update", True)
        await rpc("update_weights", TENSORS)
        before = await weights_id(server)
        await rpc("finish_weight_update")
        assert await weights_id(server) != before
        await rpc("update_weight_version", "7")
        assert (await server.http.get("/get_weight_version")).json() == {"weight_version": "7"}
        await rpc("sleep", 2)
        await rpc("wake_up", tags=["weights"])
        await rpc("reload_weights", weights_path="w1")
        await rpc("wake_up", tags=["kv_cache"])
        assert (await generate(server, 1))["output_ids"] == expected_tokens(prompt_of(1), 4, VOCAB_SIZE, "w1")
        refused = await server.post("/collective_rpc", {"method": "finish_weight_update"})
        assert refused.status_code == 400 and "no bracket is open" in refused.json()["error"]["message"]


async def test_reset_prefix_cache_answers_json(engine: LoopEngine) -> None:
    async with api(engine) as server:
        for query in ("", "?reset_external=false", "?tiers=device", "?mode=now"):
            await generate(server, 1)
            answer = await ok(server, f"/reset_prefix_cache{query}")
            assert (answer["success"], answer["freed"]["device"]["pages"] > 0) == (True, True), query
        engine.step_s = 0.01
        running = asyncio.ensure_future(generate(server, 2, 60))
        await until(lambda: engine.parts.scheduler.running)
        busy = await server.post("/reset_prefix_cache")
        assert (busy.status_code, busy.json()["success"]) == (400, False)
        await running
