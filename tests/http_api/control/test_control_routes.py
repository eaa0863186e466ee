"""Flush, pause and operations over HTTP."""

import asyncio
import json
import time

import pytest
from api_under_test import TOKENIZER, Api, api, error_of, until

from headwater.generation.model_facts import RequestLimits
from headwater.messages.base import unpack_ids
from headwater.messages.control import (
    CancelOperation,
    ContinueGeneration,
    Failed,
    FlushCache,
    FlushResult,
    OperationInfo,
    OperationList,
    PagesAndBytes,
    PauseGeneration,
)
from headwater.messages.generation import Generate
from processes import Stalls
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
JSON = {"accept": "application/json"}


def result(message: FlushCache, status: int = 200, **fields) -> FlushResult:
    success = status < 300
    given = {
        "message": "Cache flushed." if success else "Timed out waiting for idle state.",
        "mode": message.mode,
        "waited_s": 1.5,
        "success": success,
    }
    return FlushResult(call_id=message.call_id, status=status, **(given | fields))


async def newest_flush(server: Api, path: str, **request) -> FlushCache:
    response = await server.http.request(request.pop("method", "POST"), path, **request)
    assert response.status_code == 200, response.text
    return server.engine.of_type(FlushCache)[-1]


async def test_flush_as_scripts_written_for_sglang_call_it(engine: ScriptedEngine) -> None:
    """GET and POST, with a timeout or none, with `{}` or no body; the answer begins with SGLang's words."""
    async with api(engine) as server:
        for method, path, content in (
            ("GET", "/flush_cache", b""),
            ("POST", "/flush_cache", b""),
            ("POST", "/flush_cache", b"{}"),
            ("POST", "/flush_cache?timeout=60.0", b""),
            ("POST", "/flush_cache", b'{"timeout": 60, "something": "else"}'),
        ):
            response = await server.http.request(method, path, content=content)
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/plain")
            assert response.text.startswith("Cache flushed.")
    timeouts = [message.timeout_s for message in engine.of_type(FlushCache)]
    assert timeouts == pytest.approx([0, 0, 0, 60, 60], abs=0.5), "what is left of it when it is sent"
    assert all(message.mode == "idle" for message in engine.of_type(FlushCache))


async def test_a_call_about_another_model_does_nothing(engine: ScriptedEngine) -> None:
    """In the query on every route, as fleets with several models read it; in a flush's body too."""
    async with api(engine) as server:
        served = (await server.http.get("/v1/models")).json()["data"][0]["id"]
        in_query = [(f"/{name}?model=other", {"text": "a"}) for name in ("flush_cache", "pause_generation", "generate")]
        for path, body in (*in_query, ("/flush_cache", {"model": "other"}), ("/flush_cache", {"model": 3})):
            response = await server.http.post(path, json=body)
            assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found"), path
        assert not engine.of_type(FlushCache) + engine.of_type(PauseGeneration) + engine.of_type(Generate)
        for path, body in ((f"/flush_cache?model={served}", {}), ("/flush_cache", {"model": served})):
            assert (await server.http.post(path, json=body)).status_code == 200
    assert len(engine.of_type(FlushCache)) == 2


async def test_flush_answers_json_when_asked(engine: ScriptedEngine) -> None:
    engine.script.flush = lambda message: result(
        message,
        generation=4,
        freed={"device": PagesAndBytes(pages=3, bytes=3 << 20)},
        retired={"device": PagesAndBytes(pages=1, bytes=1 << 20)},
        side_caches={"grammars": 2},
        still_warm=("storage",),
    )
    async with api(engine) as server:
        response = await server.http.post("/flush_cache", headers=JSON)
        text = (await server.http.post("/flush_cache")).text
    answer = response.json()
    (one,) = answer.pop("engines")
    assert answer == {
        "success": True,
        "message": "Cache flushed.",
        "mode": "idle",
        "waited_s": 1.5,
        "generation": 4,
        "drained": True,
        "freed": {"device": {"pages": 3, "bytes": 3 << 20}},
        "retired": {"device": {"pages": 1, "bytes": 1 << 20}},
        "side_caches": {"grammars": 2},
        "still_warm": ["storage"],
        "pending": [],
        "blockers": {},
    }
    assert one["status"] == 200
    assert "call_id" not in one
    assert "Freed on device: 3 pages, 3.0 MiB." in text
    assert "Still held by running requests on device: 1 pages, 1.0 MiB." in text


async def test_a_flush_that_was_not_done_says_what_is_in_the_way(engine: ScriptedEngine) -> None:
    engine.script.flush = lambda message: result(message, 400, blockers={"running": 2, "queued": 1})
    async with api(engine) as server:
        response = await server.http.get("/flush_cache?timeout=1.5")
        assert response.status_code == 400
        assert response.text.startswith("Timed out waiting for idle state.")
        assert "1 queued request, 2 running requests" in response.text
        answer = (await server.http.get("/flush_cache", headers=JSON)).json()
        assert answer["success"] is False
        assert answer["blockers"] == {"running": 2, "queued": 1}


async def test_the_status_of_a_flush_is_the_engines(engine: ScriptedEngine) -> None:
    engine.script.flush = lambda message: result(message, 202, drained=False)
    async with api(engine) as server:
        assert (await server.http.get("/flush_cache?mode=drain&timeout=1")).status_code == 202
        engine.script.flush = lambda m: Failed(call_id=m.call_id, status=400, message="no host tier", param="tiers")
        response = await server.http.get("/flush_cache?tiers=host")
        assert (response.status_code, error_of(response)["param"]) == (400, "tiers")


@pytest.mark.parametrize(
    "timeout",
    ["-1", "-0.001", "nan", "NaN", "inf", "-inf", "abc", "", "3600.1", "1e400", "1,5", "0x10", "null"],
)
async def test_a_bad_timeout_is_a_400_that_tells_the_range(engine: ScriptedEngine, timeout: str) -> None:
    async with api(engine) as server:
        for response in (
            await server.http.get("/flush_cache", params={"timeout": timeout}),
            await server.http.post("/flush_cache", json={"timeout": timeout}),
        ):
            assert response.status_code == 400
            error = error_of(response)
            assert error["param"] == "timeout"
            assert "from 0 to 3600" in error["message"]
    assert engine.of_type(FlushCache) == []


async def test_other_bad_flush_parameters_are_named(engine: ScriptedEngine) -> None:
    bodies = [
        ({"timeout": True}, "timeout", "from 0 to 3600"),
        ({"timeout": [1]}, "timeout", "from 0 to 3600"),
        ({"timeout": float("nan")}, "timeout", "from 0 to 3600"),
        ({"mode": "later"}, "mode", "idle, now, drain"),
        ({"mode": 5}, "mode", "idle, now, drain"),
        ({"tiers": "storage", "prefix": "some text"}, "prefix", "storage cannot be flushed by prefix"),
        ({"tiers": ["storage"], "prefix_ids": [1, 2]}, "prefix_ids", "storage cannot be flushed by prefix"),
        ({"tiers": "device,tape"}, "tiers", "device, host, storage"),
        ({"tiers": []}, "tiers", "device, host, storage"),
        ({"tiers": 5}, "tiers", "device, host, storage"),
        ({"hold": "perhaps"}, "hold", "true or false"),
        ({"dry_run": 2}, "dry_run", "true or false"),
        ({"cache_salt": 5}, "cache_salt", "string"),
        ({"extra_key": "x" * 1000}, "extra_key", "256"),
        ({"prefix": ""}, "prefix", "not empty"),
        ({"prefix": "a"}, "prefix", "at least two tokens"),
        ({"prefix": "ab", "prefix_ids": [1]}, "prefix", "not both"),
        ({"prefix_ids": []}, "prefix_ids", "token ids"),
        ({"prefix_ids": "1,b"}, "prefix_ids", "token ids"),
        ({"prefix_ids": [99999]}, "prefix_ids", "from 0 to"),
        ({"prefix_ids": [True]}, "prefix_ids", "token ids"),
    ]
    async with api(engine) as server:
        for body, param, words in bodies:
            response = await server.http.post("/flush_cache", content=json.dumps(body))
            assert response.status_code == 400, body
            error = error_of(response)
            assert error["param"] == param, (body, error)
            assert words in error["message"], (body, error)
        for path, content in (
            ("/flush_cache?timeout=1&timeout=2", b""),
            ("/flush_cache?timeout=1", b'{"timeout": 1}'),
            ("/flush_cache", b'{"timeout": 1, "timeout": 2}'),
        ):
            response = await server.http.post(path, content=content)
            assert (response.status_code, error_of(response)["param"]) == (400, "timeout")
            assert "given twice" in error_of(response)["message"]
        for content in (b"[]", b"5", b'{"timeout":', b"\xff", b'[["timeout", 1]]'):
            assert (await server.http.post("/flush_cache", content=content)).status_code == 400
    assert engine.of_type(FlushCache) == []


async def test_the_limit_of_the_timeout_is_a_setting(engine: ScriptedEngine) -> None:
    async with api(engine, limits=RequestLimits(max_control_timeout_s=5)) as server:
        assert (await server.http.get("/flush_cache?timeout=5")).status_code == 200
        response = await server.http.get("/flush_cache?timeout=6")
        assert "from 0 to 5" in error_of(response)["message"]


async def test_all_flush_parameters_reach_the_engine(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        message = await newest_flush(
            server,
            "/flush_cache?mode=now&tiers=host,device&cache_salt=s&extra_key=&hold=true&dry_run=1&timeout=2.5",
            method="GET",
        )
        assert (message.mode, message.tiers) == ("now", ("device", "host"))
        assert message.timeout_s == pytest.approx(2.5, abs=0.5)
        assert (message.cache_salt, message.extra_key, message.hold, message.dry_run) == ("s", "", True, True)
        assert message.prefix_ids is None
        body = {
            "mode": "drain",
            "tiers": ["host"],
            "prefix_ids": [5, 6],
            "hold": False,
            "cache_salt": None,
        }
        message = await newest_flush(server, "/flush_cache", json=body)
        assert (message.mode, message.tiers, message.cache_salt) == ("drain", ("host",), None)
        assert unpack_ids(message.prefix_ids or b"").tolist() == [5, 6]
        message = await newest_flush(server, "/flush_cache", json={"prefix": "abc"})
        assert unpack_ids(message.prefix_ids or b"").tolist() == TOKENIZER.encode("abc")[:-1]
        message = await newest_flush(server, "/flush_cache?prefix_ids=7,8", method="GET")
        assert unpack_ids(message.prefix_ids or b"").tolist() == [7, 8]


async def test_pause_and_continue(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for body, mode in (({}, "abort"), (None, "abort"), ({"mode": "retract"}, "retract")):
            response = (
                await server.http.post("/pause_generation", json=body)
                if body is not None
                else (await server.http.post("/pause_generation"))
            )
            assert response.status_code == 200
            assert response.json()["status"] == "ok"
            assert response.json()["message"] == "Generation paused successfully."
            assert engine.of_type(PauseGeneration)[-1].mode == mode
        response = await server.post("/pause_generation", {"mode": "nap"})
        assert (response.status_code, error_of(response)["param"]) == (400, "mode")
        response = await server.post("/continue_generation", {"torch_empty_cache": True})
        answer = response.json()
        assert (answer["message"], answer["status"]) == ("Generation continued successfully.", "ok")
        assert len(engine.of_type(ContinueGeneration)) == 1


async def test_operations_are_listed_and_cancelled(engine: ScriptedEngine) -> None:
    info = OperationInfo(
        operation_id="op-1",
        kind="flush_cache",
        phase="waiting_for_idle",
        waited_s=1.0,
        remaining_s=2.0,
        blockers={"running": 1},
        call_id="call-7",
    )
    engine.script.operations = OperationList(call_id="", items=(info,))
    async with api(engine) as server:
        (listed,) = (await server.http.get("/control/operations")).json()["operations"]
        assert (listed["operation_id"], listed["blockers"]) == ("call-7", {"running": 1})
        assert (listed["kind"], listed["phase"]) == ("flush_cache", "waiting_for_idle")
        assert (listed["waited_s"], listed["remaining_s"]) == (1.0, 2.0)
        answer = (await server.http.delete("/control/operations/call-7")).json()
        assert (answer["operation_id"], answer["cancelled"]) == ("call-7", True)
        assert engine.of_type(CancelOperation)[-1].operation_id == "op-1"
        response = await server.http.delete("/control/operations/call-8")
        assert (response.status_code, error_of(response)["param"]) == (404, "operation_id")


async def test_blockers_tell_what_runs(engine: ScriptedEngine) -> None:
    engine.script.is_stalled = True
    async with api(engine) as server:
        assert (await server.http.get("/control/blockers")).json()["is_idle"] is True
        running = asyncio.ensure_future(server.post("/generate", {"text": "a"}))
        await until(lambda: engine.of_type(Generate))
        answer = (await server.http.get("/control/blockers")).json()
        assert (answer["is_idle"], answer["blockers"]) == (False, {"running": 1})
        running.cancel()


async def test_control_calls_answer_503_when_the_engine_goes(engine: ScriptedEngine) -> None:
    engine.script.flush = lambda _: None
    async with api(engine) as server:
        pending = asyncio.ensure_future(server.http.get("/flush_cache?timeout=60"))
        await until(lambda: engine.of_type(FlushCache))
        server.state.client.engine_gone(0, "killed")
        response = await asyncio.wait_for(pending, 20)
        assert (response.status_code, error_of(response)["code"]) == (503, "engine_gone")
        for method, path in (
            ("GET", "/flush_cache"),
            ("POST", "/pause_generation"),
            ("POST", "/continue_generation"),
            ("GET", "/control/operations"),
            ("DELETE", "/control/operations/x"),
            ("GET", "/control/blockers"),
        ):
            response = await server.http.request(method, path)
            assert response.status_code == 503, path
            error_of(response)


async def test_a_flush_that_the_engine_never_answers_ends(engine: ScriptedEngine) -> None:
    """The engine keeps the deadline; if its loop hangs, the caller must not."""
    engine.script.flush = lambda _: None
    async with api(engine, limits=RequestLimits(health_timeout_s=0.1)) as server:
        began_s = time.monotonic()
        with Stalls() as stalls:
            response = await asyncio.wait_for(server.http.get("/flush_cache?timeout=0.1"), 30)
            took_s = time.monotonic() - began_s
        assert took_s < 2 + stalls.lost_s
        assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
        await until(lambda: engine.of_type(CancelOperation))
