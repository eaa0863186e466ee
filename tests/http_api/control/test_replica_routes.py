"""A fleet's messages to the engine of a replica, over HTTP."""

import pytest
from api_under_test import api

from headwater.client.link import new_call_id
from headwater.http_api.control.replica_routes import CLOCK_HEADER
from headwater.messages.control import Failed, FlushCache, FlushResult
from headwater.messages.generation import Generate, SamplingParams
from headwater.messages.state import EngineReady, EngineState, GetState, Hello, Shutdown
from headwater.messages.wire import decode_to_client, encode
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
