"""LoRA adapters that a trainer sends as tensors, through HTTP against the real engine loop."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_under_test import Api, api, error_of
from handmade_pickles import dumps, shared
from loop_engines import LoopEngine, loop_engines

from headwater.devices.safetensors_header import build_header
from headwater.transports.staging import StagingArea

pytestmark = pytest.mark.anyio
ROUTE = "/load_lora_adapter_from_tensors"
SAFETENSORS = {"content-type": "application/vnd.safetensors"}
CONFIG = {"peft_type": "LORA", "r": 1}
TENSORS = build_header([("base_model.model.layers.0.lora_A.weight", "F32", (1, 2))]) + bytes(8)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path) as (engine,):
        yield engine


@pytest.fixture
def area(tmp_path: Path) -> StagingArea:
    (tmp_path / "shm").mkdir()
    return StagingArea(tmp_path / "shm", max_bytes=10_000)


async def send(server: Api, name: str, data: bytes = TENSORS, status: int = 200, **query: Any) -> dict[str, Any]:
    params = {"lora_name": name, "config_dict": json.dumps(CONFIG), **query}
    response = await server.http.post(ROUTE, content=data, headers=SAFETENSORS, params=params)
    assert response.status_code == status, response.text
    return response.json()


def folders(tmp_path: Path) -> list[Path]:
    return sorted(path.parent for path in (tmp_path / "shm").rglob("adapter_model.safetensors"))


async def test_tensors_become_an_adapter_in_the_layout_of_peft(
    engine: LoopEngine, area: StagingArea, tmp_path: Path
) -> None:
    async with api(engine, staging=area) as server:
        answer = await send(server, "one")
        assert (answer["success"], list(answer["loaded_adapters"])) == (True, ["one"])
        (folder,) = folders(tmp_path)
        assert json.loads((folder / "adapter_config.json").read_text()) == CONFIG
        assert (folder / "adapter_model.safetensors").read_bytes() == TENSORS
        assert answer["adapter_id"] == str(folder), "the engine has read that folder"


async def test_the_folder_stays_while_an_engine_may_read_it_again(
    engine: LoopEngine, area: StagingArea, tmp_path: Path
) -> None:
    """A restarted engine reads it; without an end, a training run would fill the memory."""
    weights = build_header([("weight", "F32", (1,)), ("bias", "F32", (2,))]) + bytes(12)
    async with api(engine, staging=area) as server:
        await send(server, "one")
        first = folders(tmp_path)
        pushed = await server.http.post("/update_weights_from_tensor", content=weights, headers=SAFETENSORS)
        assert pushed.status_code == 200, pushed.text
        assert folders(tmp_path) == first, "new weights leave it"
        await send(server, "one", status=400)
        assert folders(tmp_path) == first, "what was refused is not kept"
        await send(server, "one", load_inplace="true")
        assert len(folders(tmp_path)) == 1 and folders(tmp_path) != first
        assert (await server.post("/unload_lora_adapter", {"lora_name": "one"})).status_code == 200
        assert folders(tmp_path) == []


@pytest.mark.parametrize("data", [TENSORS[:-1], TENSORS[:9], b"", b"\xff" * 40])
async def test_a_torn_body_changes_nothing(
    engine: LoopEngine, area: StagingArea, tmp_path: Path, data: bytes
) -> None:
    async with api(engine, staging=area) as server:
        await send(server, "one", data, 400)
        assert folders(tmp_path) == []
        assert [each["id"] for each in (await server.http.get("/v1/models")).json()["data"]][1:] == []
    assert not area.num_bytes


async def test_what_does_not_fit_is_a_413(engine: LoopEngine, area: StagingArea) -> None:
    async with api(engine, staging=area) as server:
        await send(server, "one", bytes(20_000), 413)


async def test_a_pickle_needs_permission(engine: LoopEngine, area: StagingArea, tmp_path: Path) -> None:
    payload = base64.b64encode(dumps([("a.lora_A.weight", shared(b"/none", 8, "float32", (1, 2), (2, 1)))])).decode()
    body = {"lora_name": "one", "config_dict": CONFIG, "serialized_tensors": payload}
    async with api(engine, staging=area) as server:
        answer = await server.post(ROUTE, body)
        assert (answer.status_code, error_of(answer)["param"]) == (400, "serialized_tensors")
    assert folders(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"config_dict": CONFIG}, "lora_name"),
        ({"lora_name": "one"}, "config_dict"),
        ({"lora_name": "one", "config_dict": CONFIG}, "safetensors_path"),
        ({"lora_name": "one", "config_dict": CONFIG, "safetensors_path": "/etc/passwd"}, "safetensors_path"),
        ({"lora_name": "one", "config_dict": CONFIG, "load_format": "torch"}, "load_format"),
    ],
)
async def test_a_wrong_parameter_is_named(
    engine: LoopEngine, area: StagingArea, body: dict[str, Any], param: str
) -> None:
    async with api(engine, staging=area) as server:
        answer = await server.post(ROUTE, body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param), answer.text
