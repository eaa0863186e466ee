"""Tensors from a trainer through HTTP, alone and in brackets, against the real engine loop."""

import asyncio
import base64
import contextlib
import math
import os
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from api_under_test import Api, api, until
from handmade_pickles import Named, dumps, shared
from loop_engines import VOCAB_SIZE, LoopEngine, expected, loop_engines, prompt_of

from headwater.devices.safetensors_header import build_header
from headwater.simulation.fakes.canary import expected_tokens
from headwater.transports.receivers import ReceiverGroups
from headwater.transports.staging import StagingArea

pytestmark = pytest.mark.anyio
ROUTE = "/update_weights_from_tensor"
SAFETENSORS = {"content-type": "application/vnd.safetensors"}


def bucket(**shapes: tuple[int, ...]) -> bytes:
    header = build_header([(name, "F32", shape) for name, shape in shapes.items()])
    return header + bytes(4 * sum(map(math.prod, shapes.values())))


WEIGHT, BIAS, BOTH = bucket(weight=(1,)), bucket(bias=(2,)), bucket(weight=(1,), bias=(2,))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path) as (engine,):
        yield engine


@pytest.fixture
def area(tmp_path: Path) -> StagingArea:
    return StagingArea(tmp_path / "shm", max_bytes=100_000)


@pytest.fixture(autouse=True)
def shm(tmp_path: Path) -> Path:
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


async def push(server: Api, data: bytes, status: int = 200, **query: Any) -> dict[str, Any]:
    response = await server.http.post(ROUTE, content=data, headers=SAFETENSORS, params=query)
    assert response.status_code == status, response.text
    assert set(response.json()) >= {"success", "message"}
    return response.json()


async def call(server: Api, path: str, body: Any = None, status: int = 200) -> dict[str, Any]:
    response = await server.post(path, body)
    assert response.status_code == status, response.text
    return response.json()


async def text_of(server: Api, prompt: list[int], num_tokens: int = 4) -> tuple[list[int], str]:
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens}}
    answer = (await server.post("/generate", body)).json()
    return answer["output_ids"], answer["meta_info"]["weight_version"]


def files(shm: Path) -> list[str]:
    return sorted(path.name for path in shm.rglob("*.safetensors")) + [path.name for path in shm.rglob("*.part")]


async def test_a_body_is_swapped_in_at_once(engine: LoopEngine, area: StagingArea, shm: Path) -> None:
    prompt = prompt_of(1)
    async with api(engine, staging=area) as server:
        assert (await text_of(server, prompt))[0] == expected(prompt, 4)
        answer = await push(server, BOTH, weight_version="step-1")
        assert (answer["success"], answer["weight_version"]) == (True, "step-1")
        assert answer["paused_s"] >= 0
        assert await text_of(server, prompt) == (expected_tokens(prompt, 4, VOCAB_SIZE, answer["weights_id"]), "step-1")
        second = await push(server, BOTH)
        assert second["weights_id"] != answer["weights_id"], "a trainer's next step is never taken for the last one"
        assert files(shm) == ["000001.safetensors"], "only the tensors in place are kept"


async def test_tensors_that_files_replace_leave_the_memory(engine: LoopEngine, area: StagingArea, shm: Path) -> None:
    async with api(engine, staging=area) as server:
        await push(server, BOTH)
        assert area.num_bytes > 0
        await call(server, "/update_weights_from_disk", {"model_path": "/other"})
        assert (area.num_bytes, files(shm)) == (0, [])


async def test_copies_on_a_gpu_are_freed_when_they_are_in_place_or_given_up(
    engine: LoopEngine, area: StagingArea, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a third copy of the weights would stay on the card for ever."""
    freed: list[int] = []

    async def drop(self: ReceiverGroups) -> None:
        freed.append(1)

    monkeypatch.setattr(ReceiverGroups, "drop_from_gpu", drop)
    async with api(engine, staging=area, stages_on_gpu=True) as server:
        await push(server, BOTH)
        await until(lambda: len(freed) == 1)  # a task of its own frees them
        await call(server, "/begin_weight_update")
        await push(server, WEIGHT)
        await asyncio.sleep(0.01)
        assert len(freed) == 1, "an open bracket needs them"
        await call(server, "/abort_weight_update")
        await until(lambda: len(freed) == 2)


async def test_a_bracket_shows_all_buckets_at_its_end_and_nothing_before(engine: LoopEngine, area: StagingArea) -> None:
    prompt = prompt_of(1)
    async with api(engine, staging=area) as server:
        begun = await call(server, "/begin_weight_update")
        first = await push(server, WEIGHT, weight_version="step-1")
        assert first["transfer_id"] == begun["transfer_id"]
        await push(server, BIAS, transfer_id=begun["transfer_id"])
        assert await text_of(server, prompt) == (expected(prompt, 4), "default")
        label = await call(server, "/update_weight_version", {"new_version": "step-2"})
        assert label["success"]
        assert (await server.http.get("/model_info")).json()["weight_version"] == "default"
        ended = await call(server, "/end_weight_update")
        assert ended["weight_version"] == "step-2"
        assert await text_of(server, prompt) == (expected_tokens(prompt, 4, VOCAB_SIZE, ended["weights_id"]), "step-2")
        await call(server, "/end_weight_update", status=400)


async def test_the_last_label_of_a_bracket_counts(engine: LoopEngine, area: StagingArea) -> None:
    async with api(engine, staging=area) as server:
        await call(server, "/begin_weight_update")
        await push(server, BOTH, weight_version="of the bucket")
        ended = await call(server, "/end_weight_update", {"weight_version": "of the end"})
        assert ended["weight_version"] == "of the end"


async def test_a_second_begin_is_a_400_and_an_abort_drops_everything(
    engine: LoopEngine, area: StagingArea, shm: Path
) -> None:
    prompt = prompt_of(1)
    async with api(engine, staging=area) as server:
        await call(server, "/begin_weight_update", {})
        await push(server, BOTH)
        refused = await call(server, "/begin_weight_update", status=400)
        assert refused["success"] is False and "a bracket is open" in refused["message"]
        assert "1 buckets were dropped" in (await call(server, "/abort_weight_update"))["message"]
        assert files(shm) == []
        assert await text_of(server, prompt) == (expected(prompt, 4), "default")
        assert (await call(server, "/abort_weight_update"))["success"]


async def test_a_trainer_that_dies_in_a_bracket_leaves_the_old_weights(
    engine: LoopEngine, area: StagingArea, shm: Path
) -> None:
    prompt = prompt_of(1)
    async with api(engine, staging=area) as server:
        await call(server, "/begin_weight_update", {"timeout": 30})
        await push(server, BOTH)
        receiver = server.app.state.services.weights
        receiver._transfers.open.deadline_s = asyncio.get_running_loop().time() + 0.01
        receiver._watch()
        await until(lambda: files(shm) == [])  # without any call
        assert "not ended by its deadline" in (await push(server, BOTH, status=400))["message"]
        assert "not ended by its deadline" in (await call(server, "/end_weight_update", status=400))["message"]
        assert await text_of(server, prompt) == (expected(prompt, 4), "default")
        await call(server, "/begin_weight_update")
        await push(server, BOTH)
        await call(server, "/end_weight_update")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (BOTH[:-1], "no whole safetensors file"),
        (b"", "no whole safetensors file"),
        (bucket(wieght=(1,)), "no tensor 'wieght'"),
        (bucket(weight=(3,)), "has shape [3]"),
    ],
)
async def test_a_bad_bucket_changes_nothing(
    engine: LoopEngine, area: StagingArea, shm: Path, data: bytes, reason: str
) -> None:
    prompt = prompt_of(1)
    async with api(engine, staging=area) as server:
        assert reason in (await push(server, data, status=400))["message"]
        assert files(shm) == []
        await call(server, "/begin_weight_update")
        await push(server, BOTH)
        await push(server, data, status=400)
        assert "cannot be completed" in (await call(server, "/end_weight_update", status=400))["message"]
        assert files(shm) == []
        assert await text_of(server, prompt) == (expected(prompt, 4), "default")


async def test_a_sender_that_leaves_in_the_middle_changes_nothing(
    engine: LoopEngine, area: StagingArea, shm: Path
) -> None:
    async def half():
        yield BOTH[:50]
        raise ConnectionError

    prompt = prompt_of(1)
    async with api(engine, staging=area) as server:
        assert not (await server.http.post(ROUTE, content=half(), headers=SAFETENSORS)).is_success
        await until(lambda: files(shm) == [])
        assert await text_of(server, prompt) == (expected(prompt, 4), "default")


async def test_bodies_may_be_larger_than_other_bodies_and_are_bounded_by_the_staging_area(
    engine: LoopEngine, shm: Path
) -> None:
    small = StagingArea(shm, max_bytes=2000)
    async with api(engine, staging=small) as server:
        server.state.limits = replace(server.state.limits, max_body_bytes=1024)
        answer = await push(server, BOTH + bytes(5000), status=413)
        assert "--max-staged-weights-bytes" in answer["message"]
        assert files(shm) == []


async def test_a_file_in_shared_memory(
    engine: LoopEngine, area: StagingArea, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwater.http_api.control.weights.routes.SHARED_MEMORY", shm)
    (shm / "bucket.safetensors").write_bytes(BOTH)
    async with api(engine, staging=area) as server:
        answer = await call(server, ROUTE, {"safetensors_path": str(shm / "bucket.safetensors")})
        assert answer["success"]
        for path in ("/etc/hostname", f"{shm}/../x", "bucket.safetensors"):
            answer = await call(server, ROUTE, {"safetensors_path": path}, status=400)
            assert answer["error"]["param"] == "safetensors_path"


async def test_running_requests_go_on_across_a_push_in_place(engine: LoopEngine, area: StagingArea) -> None:
    """Between the old and the new weights, nothing is computed and no page can be matched."""
    prompt = prompt_of(1)
    async with api(engine, staging=area) as server:
        engine.step_s = 0.002
        running = asyncio.create_task(text_of(server, prompt, 100))
        await until(lambda: engine.parts.scheduler.running)
        engine.runner.weights.num_polls = 10
        answer = await push(server, BOTH, in_place=True)
        assert answer["num_kept"] == 1 and answer["paused_s"] > 0
        assert len((await running)[0]) == 100
        assert (await text_of(server, prompt))[0] == expected_tokens(prompt, 4, VOCAB_SIZE, answer["weights_id"])


async def test_a_push_in_place_that_fails_in_the_middle_refuses_requests_until_whole_weights_come(
    engine: LoopEngine, area: StagingArea
) -> None:
    prompt = prompt_of(1)
    async with api(engine, staging=area) as server:
        engine.runner.weights.overwriting_fails = "OSError: memory"
        answer = await push(server, BOTH, status=500, in_place=True)
        assert "the weights are incomplete (OSError: memory)" in answer["message"]
        response = await server.post("/generate", {"input_ids": prompt})
        assert response.status_code == 503 and "incomplete" in response.text
        engine.runner.weights.overwriting_fails = None
        answer = await push(server, BOTH)
        assert (await text_of(server, prompt))[0] == expected_tokens(prompt, 4, VOCAB_SIZE, answer["weights_id"])


async def test_several_engines_put_the_same_tensors_in_place(tmp_path: Path, area: StagingArea) -> None:
    prompt = prompt_of(1)
    with loop_engines(tmp_path, 2) as engines:
        async with api(*engines, staging=area) as server:
            answer = await push(server, BOTH, weight_version="step-1")
            assert {entry["weights_id"] for entry in answer["engines"]} == {answer["weights_id"]}
            for rank in (0, 1):
                body = {"input_ids": prompt, "routed_dp_rank": rank, "sampling_params": {"max_new_tokens": 4}}
                found = (await server.post("/generate", body)).json()["output_ids"]
                assert found == expected_tokens(prompt, 4, VOCAB_SIZE, answer["weights_id"])


async def test_without_tensors_the_answer_says_what_to_send(engine: LoopEngine, area: StagingArea) -> None:
    async with api(engine, staging=area) as server:
        answer = await call(server, ROUTE, {}, status=400)
        assert "send a safetensors body" in answer["message"]
        answer = await call(server, ROUTE, {"load_format": "gguf"}, status=400)
        assert answer["error"]["param"] == "load_format"


@pytest.fixture
def payload() -> Iterator[str]:
    """A pickle of both tensors of the fake model, which lie in shared memory as PyTorch puts them there."""
    name = f"torch_{os.getpid()}_{random.getrandbits(31)}_0"
    path = Path("/dev/shm") / name
    path.write_bytes(bytes(64 + 12))
    tensors = [
        ("weight", shared(f"/{name}".encode(), 12, "float32", (1,), (1,))),
        ("bias", shared(f"/{name}".encode(), 12, "float32", (2,), (1,), 1)),
    ]
    yield base64.b64encode(dumps(tensors)).decode()
    path.unlink()


async def test_pickles_need_a_flag(engine: LoopEngine, area: StagingArea, payload: str) -> None:
    async with api(engine, staging=area) as server:
        answer = await call(server, ROUTE, {"serialized_named_tensors": [payload]}, status=400)
        assert answer["error"]["code"] == "pickles_not_allowed"
        assert "--allow-pickled-tensors" in answer["message"]


async def test_sglangs_form(engine: LoopEngine, area: StagingArea, payload: str) -> None:
    """All fields, as SGLang's clients send them."""
    prompt = prompt_of(1)
    async with api(engine, staging=area, allows_pickles=True, admin_api_key="root") as server:
        server.http.headers["authorization"] = "Bearer root"
        body = {
            "serialized_named_tensors": [payload, payload],
            "load_format": None,
            "flush_cache": False,
            "abort_all_requests": False,
            "weight_version": "7",
            "selector": "all",
            "torch_empty_cache": False,
        }
        answer = await call(server, ROUTE, body)
        assert (answer["success"], answer["weight_version"]) == (True, "7")
        assert (await text_of(server, prompt))[0] == expected_tokens(prompt, 4, VOCAB_SIZE, answer["weights_id"])


@pytest.mark.parametrize(
    "payload",
    ["!", base64.b64encode(b"cos\nsystem\n(X\x02\x00\x00\x00lstR.").decode(), base64.b64encode(b"\x80\x04N.").decode()],
)
async def test_a_pickle_that_is_refused_changes_nothing(
    engine: LoopEngine, area: StagingArea, shm: Path, payload: str
) -> None:
    prompt = prompt_of(1)
    async with api(engine, staging=area, allows_pickles=True, admin_api_key="root") as server:
        assert (await server.post(ROUTE, {"serialized_named_tensors": [payload]})).status_code == 401
        server.http.headers["authorization"] = "Bearer root"
        answer = await call(server, ROUTE, {"serialized_named_tensors": [payload]}, status=400)
        assert answer["error"]["code"] == "bad_pickle"
        assert files(shm) == []
        assert await text_of(server, prompt) == (expected(prompt, 4), "default")


async def test_the_calls_of_miles_and_slime_with_tensors(engine: LoopEngine, area: StagingArea, payload: str) -> None:
    """As these trainers send them, with a rollout in flight (the orders are those of their sources)."""
    prompt = prompt_of(1)
    async with api(engine, staging=area, allows_pickles=True, admin_api_key="root") as server:
        server.http.headers["authorization"] = "Bearer root"
        engine.step_s = 0.002
        running = asyncio.create_task(text_of(server, prompt, 60))
        await until(lambda: engine.parts.scheduler.running)
        tensors = {"serialized_named_tensors": [payload], "flush_cache": False}
        await call(server, "/pause_generation", {"mode": "retract"})  # miles
        assert (await server.http.get("/flush_cache")).status_code == 200
        await call(server, "/begin_weight_update", {})
        await call(server, ROUTE, tensors)
        await call(server, ROUTE, tensors)
        await call(server, "/update_weight_version", {"new_version": "1", "abort_all_requests": False})
        ended = await call(server, "/end_weight_update", {})
        await call(server, "/continue_generation", {})
        tokens, label = await running
        assert (len(tokens), label) == (60, "1")
        assert (await text_of(server, prompt))[0] == expected_tokens(prompt, 4, VOCAB_SIZE, ended["weights_id"])
        assert (await server.http.get("/model_info")).json()["weight_version"] == "1"
        await call(server, "/pause_generation", {})  # slime
        assert (await server.http.get("/flush_cache")).status_code == 200
        answer = await call(server, ROUTE, tensors | {"weight_version": "2"})
        await call(server, "/continue_generation", {})
        assert await text_of(server, prompt) == (expected_tokens(prompt, 4, VOCAB_SIZE, answer["weights_id"]), "2")
        assert (await server.http.get("/get_weight_version")).json()["weight_version"] == "2"


@pytest.fixture
def flattened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Makes SGLang's flattened buckets of zeros: bytes of several tensors as one, and where each of them lies."""
    module = types.ModuleType("sglang.srt.weight_sync.tensor_bucket")
    fields = ["name", "shape", "dtype", "start_idx", "end_idx", "numel"]
    metadata_class = make_dataclass("FlattenedTensorMetadata", fields)
    metadata_class.__module__ = module.__name__
    module.FlattenedTensorMetadata = metadata_class  # type: ignore[attr-defined]
    for package in ("sglang", "sglang.srt", "sglang.srt.weight_sync"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with contextlib.ExitStack() as stack:

        def make(**shapes: tuple[int, ...]) -> str:
            name = f"torch_{os.getpid()}_{random.getrandbits(31)}_0"
            metadata, at = [], 0
            for tensor, shape in shapes.items():
                size = Named("torch", "Size", shape)
                end = at + 4 * math.prod(shape)
                metadata.append(metadata_class(tensor, size, Named("torch", "float32"), at, end, end - at))
                at = end
            path = Path("/dev/shm") / name
            path.write_bytes(bytes(64 + at))
            stack.callback(path.unlink)
            whole = shared(f"/{name}".encode(), at, "uint8", (at,), (1,))
            return base64.b64encode(dumps({"flattened_tensor": whole, "metadata": metadata})).decode()

        yield make


async def test_the_calls_of_verl_with_flattened_buckets(
    engine: LoopEngine, area: StagingArea, flattened: Callable[..., str]
) -> None:
    """Its step: lend the memory, take the weights' back, buckets, flush, take the cache's back. Rollouts wait."""
    async with api(engine, staging=area, allows_pickles=True, admin_api_key="root") as server:
        server.http.headers["authorization"] = "Bearer root"
        assert (await server.http.get("/health_generate")).status_code == 200
        for step in range(2):
            assert (await server.http.get("/flush_cache")).status_code == 200
            await call(server, "/release_memory_occupation", {"tags": ["kv_cache", "weights"]})
            early = asyncio.create_task(text_of(server, prompt_of(5), 6))
            await until(lambda: engine.parts.scheduler.waiting)
            await call(server, "/resume_memory_occupation", {"tags": ["weights"]})
            for payload in (flattened(weight=(1,)), flattened(bias=(2,)), flattened(weight=(1,), bias=(2,))):
                body = {
                    "serialized_named_tensors": [payload, payload],  # one for each rank that it knows of
                    "load_format": "flattened_bucket",
                    "flush_cache": False,
                    "weight_version": str(step),
                }
                answer = await call(server, ROUTE, body)
            assert (await server.http.get("/flush_cache")).status_code == 200
            assert not early.done()
            await call(server, "/resume_memory_occupation", {"tags": ["kv_cache"]})
            assert await early == (expected_tokens(prompt_of(5), 6, VOCAB_SIZE, answer["weights_id"]), str(step))
            tokens, label = await text_of(server, prompt_of(step))
            assert (tokens, label) == (
                expected_tokens(prompt_of(step), 4, VOCAB_SIZE, answer["weights_id"]), str(step)
            )  # fmt: skip


async def test_a_flattened_bucket_of_a_bracket_that_does_not_fit_leaves_the_old_weights(
    engine: LoopEngine, area: StagingArea, flattened: Callable[..., str]
) -> None:
    async with api(engine, staging=area, allows_pickles=True, admin_api_key="root") as server:
        server.http.headers["authorization"] = "Bearer root"
        await call(server, "/pause_generation", {"mode": "retract"})
        await call(server, "/begin_weight_update", {})
        body = {"load_format": "flattened_bucket", "flush_cache": False}
        await call(server, ROUTE, body | {"serialized_named_tensors": [flattened(weight=(1,))]})
        wrong = await call(server, ROUTE, body | {"serialized_named_tensors": [flattened(bias=(3,))]}, status=400)
        assert "has shape [3]" in wrong["message"]
        assert (await server.post("/end_weight_update", {})).status_code == 400
        await call(server, "/continue_generation", {})
        assert await text_of(server, prompt_of(1)) == (expected(prompt_of(1), 4), "default")
