"""A fleet's messages to the engine of a replica, over HTTP."""

from pathlib import Path

import pytest
from api_under_test import api

from headwater.client.link import new_call_id
from headwater.generation.model_facts import RequestLimits
from headwater.http_api.control.replica_routes import CLOCK_HEADER, STAGED
from headwater.messages.control import Failed, FlushCache, FlushResult
from headwater.messages.generation import Generate, SamplingParams
from headwater.messages.state import EngineReady, EngineState, GetState, Hello, Shutdown
from headwater.messages.wire import decode_to_client, encode
from headwater.transports.staging import StagingArea
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
ROUTE = "/control/messages"


async def test_calls_are_answered_as_on_the_engines_socket(engine: ScriptedEngine) -> None:
    async with api(engine, is_replica=True) as server:
        for message, kind in ((Hello, EngineReady), (GetState, EngineState), (FlushCache, FlushResult)):
            call = message(call_id=new_call_id())
            answer = await server.http.post(ROUTE, content=encode(call))
            assert answer.status_code == 200 and float(answer.headers[CLOCK_HEADER]) > 0
            decoded = decode_to_client(answer.content)
            assert isinstance(decoded, kind) and decoded.call_id == call.call_id


async def test_a_refusal_of_the_engine_is_an_answer(engine: ScriptedEngine) -> None:
    engine.script.answers = {FlushCache: lambda m: Failed(call_id=m.call_id, status=409, message="no")}
    async with api(engine, is_replica=True) as server:
        answer = await server.http.post(ROUTE, content=encode(FlushCache(call_id=new_call_id())))
        assert answer.status_code == 200 and decode_to_client(answer.content).message == "no"  # type: ignore[union-attr]


async def test_only_calls_are_taken_and_by_replicas_only(engine: ScriptedEngine) -> None:
    generate = Generate(rid="r", prompt_ids=b"\0\0\0\0", sampling=SamplingParams())
    async with api(engine, is_replica=True) as server:
        for body in (b"nonsense", encode(generate), encode(Shutdown(call_id="s"))):
            assert (await server.http.post(ROUTE, content=body)).status_code == 400
    async with api(engine) as server:
        assert (await server.http.post(ROUTE, content=encode(GetState(call_id="g")))).status_code == 404


async def test_it_needs_the_admin_key(engine: ScriptedEngine) -> None:
    async with api(engine, is_replica=True, admin_api_key="secret") as server:
        body = encode(GetState(call_id="g"))
        assert (await server.http.post(ROUTE, content=body)).status_code == 401
        key = {"authorization": "Bearer secret"}
        assert (await server.http.post(ROUTE, content=body, headers=key)).status_code == 200


async def test_pieces_of_tensors_are_staged_as_the_front_sends_them(engine: ScriptedEngine, tmp_path: Path) -> None:
    def piece(id: str, offset: int, keep: str = "") -> dict[str, str | int]:
        return {"weights_id": id, "bucket": "000001.safetensors", "offset": offset, "keep": keep}

    raw = {"content-type": "application/octet-stream"}
    first, second = "a" * 32, "b" * 32
    area = StagingArea(tmp_path, max_bytes=8 << 20)
    limits = RequestLimits(max_body_bytes=1 << 10)  # pieces are larger
    async with api(engine, is_replica=True, staging=area, limits=limits) as server:
        halves = [bytes(2 << 20), b"x" * (1 << 20)]
        for offset, half in ((0, halves[0]), (2 << 20, halves[1]), (0, halves[0])):  # the last one once more
            answer = await server.http.post(STAGED, params=piece(first, offset), content=half, headers=raw)
            assert answer.status_code == 200, answer.text
        path = answer.json()["path"]
        assert content_of(path) == {"000001.safetensors": b"".join(halves)} and area.num_bytes == 3 << 20
        wrong = [piece("../" + "a" * 29, 0), piece(first, -1), piece(first, 0) | {"bucket": "../x.safetensors"}]
        for query in wrong:
            assert (await server.http.post(STAGED, params=query, content=b"x", headers=raw)).status_code == 400, query
        full = await server.http.post(STAGED, params=piece(second, 0, first), content=bytes(6 << 20), headers=raw)
        assert full.status_code == 413 and content_of(path)
        await server.http.post(STAGED, params=piece(second, 0, second), content=bytes(6 << 20), headers=raw)
        assert not content_of(path), "weights that the front no longer names"
        area.close()
    async with api(engine) as server:
        assert (await server.http.post(STAGED, params=piece(first, 0), content=b"x", headers=raw)).status_code == 404


def content_of(folder: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(folder).glob("*")}
