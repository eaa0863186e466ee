"""A trainer and the server as two processes of a group over gloo: buckets, faults, and groups made anew."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from api_under_test import Api, api
from loop_engines import VOCAB_SIZE, LoopEngine, expected, loop_engines, prompt_of

from headwater.devices.safetensors_header import parse_header
from headwater.simulation.fakes.canary import expected_tokens
from headwater.transports.receivers import safetensors_dtypes
from headwater.transports.staging import StagingArea
from processes import held_port, number_of

pytestmark = [pytest.mark.anyio, pytest.mark.slow]
NAME = "trainer"
BUCKET = {"names": ["weight", "bias"], "dtypes": ["float32", "bfloat16"], "shapes": [[1], [2]], "group_name": NAME}
SENT = [([1], "float32", 5.0), ([2], "bfloat16", 6.0)]


class Trainer:
    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port

    async def order(self, **order: Any) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return (await asyncio.wait_for(self._process.stdout.readline(), 90)).decode().strip()

    def kill(self) -> None:
        self._process.kill()


@asynccontextmanager
async def trainer() -> AsyncIterator[Trainer]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__).parent / "trainer.py"),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        with held_port() as holder:
            yield Trainer(process, number_of(holder))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    with loop_engines(tmp_path) as (engine,):
        yield engine


@pytest.fixture
def area(tmp_path: Path) -> StagingArea:
    (tmp_path / "shm").mkdir()
    return StagingArea(tmp_path / "shm", max_bytes=100_000)


async def call(server: Api, path: str, body: Any, status: int = 200) -> dict[str, Any]:
    response = await server.post(path, body, timeout=120)
    assert response.status_code == status, response.text
    return response.json()


async def join(server: Api, other: Trainer, *, num_ranks: int, name: str = NAME) -> None:
    body = {
        "master_address": "127.0.0.1", "master_port": other.port, "rank_offset": 1, "world_size": 1 + num_ranks,
        "group_name": name, "backend": "gloo",
    }  # fmt: skip
    joined = other.order(join={"port": other.port, "world_size": 1 + num_ranks, "name": name})
    answer, said = await asyncio.gather(call(server, "/init_weights_update_group", body), joined)
    assert answer["success"] and said == "ok"


async def update(server: Api, other: Trainer, body: Any, sent: Any, status: int = 200) -> tuple[dict[str, Any], str]:
    return await asyncio.gather(
        call(server, "/update_weights_from_distributed", body, status), other.order(send=sent)
    )  # type: ignore[return-value]


async def tokens_of(server: Api, rank: int = 0) -> list[int]:
    body = {"input_ids": prompt_of(1), "routed_dp_rank": rank, "sampling_params": {"max_new_tokens": 4}}
    return (await server.post("/generate", body)).json()["output_ids"]


def received(area: StagingArea) -> dict[str, bytes]:
    found = {}
    assert area._root is not None
    for path in sorted(area._root.rglob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, stored in parse_header(data[8 : 8 + length], size=len(data)).items():
            found[name] = data[stored.start : stored.start + stored.num_bytes]
    return found


async def test_buckets_brackets_faults_and_a_new_group(tmp_path: Path, area: StagingArea) -> None:
    """Two engines, both members. One test, because each process with PyTorch takes seconds to start."""
    with loop_engines(tmp_path, 2) as engines:
        async with api(*engines, staging=area) as server, trainer() as other:
            await join(server, other, num_ranks=2)
            first, said = await update(server, other, BUCKET | {"weight_version": "1"}, SENT)
            assert (said, first["weight_version"]) == ("ok", "1")
            for rank in (0, 1):
                tokens = await tokens_of(server, rank)
                assert tokens == expected_tokens(prompt_of(1), 4, VOCAB_SIZE, first["weights_id"])
            assert received(area) == {"weight": b"\0\0\xa0\x40", "bias": b"\xc0\x40" * 2}

            await call(server, "/begin_weight_update", {})
            flat = BUCKET | {"load_format": "flattened_bucket"}
            answer, said = await update(server, other, flat, [([8], "uint8", 7)])
            assert (said, answer["num_buckets"]) == ("ok", 1)
            assert await tokens_of(server) == expected_tokens(prompt_of(1), 4, VOCAB_SIZE, first["weights_id"])
            ended = await call(server, "/end_weight_update", {})
            assert received(area) == {"weight": b"\x07" * 4, "bias": b"\x07" * 4}
            assert await tokens_of(server) == expected_tokens(prompt_of(1), 4, VOCAB_SIZE, ended["weights_id"])

            wrong = BUCKET | {"shapes": [[2], [2]]}
            answer, said = await update(server, other, wrong, [([2], "float32", 5.0), SENT[1]], status=400)
            assert said == "ok" and "has shape [2]" in answer["message"], "the trainer is not left waiting"
            answer, _ = await update(server, other, BUCKET, SENT)
            assert answer["success"], "the group is usable after a refused bucket"

            silent = await call(server, "/update_weights_from_distributed", BUCKET | {"timeout": 0.3}, 400)
            assert "sent nothing more within" in silent["message"] and "make it anew" in silent["message"]
            gone = await call(server, "/update_weights_from_distributed", BUCKET, 400)
            assert "there is no group" in gone["message"]

            again = BUCKET | {"group_name": "again"}
            with held_port() as second:
                other.port = number_of(second)
                await join(server, other, num_ranks=2, name="again")
            answer, _ = await update(server, other, again, SENT)
            assert await tokens_of(server) == expected_tokens(prompt_of(1), 4, VOCAB_SIZE, answer["weights_id"])
            updating = asyncio.create_task(call(server, "/update_weights_from_distributed", again, 400))
            await asyncio.sleep(0.2)
            other.kill()
            assert "the group 'again' has ended" in (await updating)["message"]
            left = await call(server, "/destroy_weights_update_group", {"group_name": "again"})
            assert "There was no group" in left["message"]
            assert await tokens_of(server) == expected_tokens(prompt_of(1), 4, VOCAB_SIZE, answer["weights_id"])


async def test_a_group_that_cannot_be_made_is_refused(engine: LoopEngine, area: StagingArea) -> None:
    group = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    async with api(engine, staging=area) as server:
        path = "/init_weights_update_group"
        answer = await call(server, path, group | {"timeout": 0.2}, 400)
        assert "the group was not made" in answer["message"]
        for change, param in (({"backend": "nccl"}, "backend"), ({"rank_offset": 0}, "rank_offset"),
                              ({"rank_offset": 2}, "rank_offset"), ({"world_size": 1}, "world_size")):  # fmt: skip
            assert (await server.post(path, group | change)).json()["error"]["param"] == param
        assert await tokens_of(server) == expected(prompt_of(1), 4)
        for change, param in (({"names": ["weight"]}, "names"), ({"dtypes": ["float31", "float32"]}, "dtypes"),
                              ({"names": ["a", "a"]}, "names"), ({"shapes": [[-1], [2]]}, "shapes")):  # fmt: skip
            answer = await call(server, "/update_weights_from_distributed", BUCKET | change, 400)
            assert answer["error"]["param"] == param


def test_dtypes_by_pytorchs_names() -> None:
    assert safetensors_dtypes(["torch.bfloat16", "float32"]) == ("BF16", "F32")
