"""Attaching, detaching, showing and clearing a store over HTTP."""

import json

import pytest
from api_under_test import api, error_of

from headwater.messages.cache import AttachStorage, DetachStorage, GetStorage, StorageInfo
from headwater.messages.control import Failed, FlushCache, FlushResult
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
JSON = {"accept": "application/json"}
ROUTE = "/hicache/storage-backend"
EXTRA = "hicache_storage_backend_extra_config_json"


@pytest.fixture
def stored(engine: ScriptedEngine) -> ScriptedEngine:
    """An engine with a store attached."""

    def info(message) -> StorageInfo:
        return StorageInfo(
            call_id=message.call_id, kind="file", prefetch_policy="timeout", breaker="closed", num_pages=7,
            capacity_bytes=1000, num_given_up=2, message="as it is", write_policy="write_back",
        )  # fmt: skip

    engine.script.answers = dict.fromkeys((AttachStorage, DetachStorage, GetStorage), info)
    return engine


async def test_attach_takes_sglangs_names_and_ours(stored: ScriptedEngine) -> None:
    """The extra configuration as text, as an object, or as plain fields that win over it."""
    extra = {"directory": "/store", "size": "2GiB"}
    bodies = (
        {"hicache_storage_backend_extra_config_json": json.dumps(extra)},
        {"hicache_storage_backend_extra_config_json": extra},
        {"directory": "/store", "size": 2 << 30},
        {"directory": "/store", "hicache_storage_backend_extra_config_json": {"directory": "/no", "size": 2 << 30}},
    )
    async with api(stored) as server:
        for body in bodies:
            body |= {"hicache_storage_backend": "file", "hicache_storage_prefetch_policy": "best_effort"}
            answer = await server.http.put(ROUTE, json=body)
            assert (answer.status_code, answer.text) == (200, "HiCache storage backend attached. as it is\n")
    for message in stored.of_type(AttachStorage):
        assert (message.kind, message.directory, message.size_bytes) == ("file", "/store", 2 << 30)
        assert message.prefetch_policy == "best_effort"


async def test_answers_are_json_when_asked(stored: ScriptedEngine) -> None:
    async with api(stored) as server:
        for method, body in (("PUT", {"hicache_storage_backend": "memory"}), ("DELETE", None)):
            answer = (await server.http.request(method, ROUTE, json=body, headers=JSON)).json()
            (one,) = answer["engines"]
            assert answer["success"] and one["kind"] == "file" and one["num_given_up"] == 2


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "hicache_storage_backend", "required"),
        ({"hicache_storage_backend": "mooncake"}, "hicache_storage_backend", "'file', 'redis' or 'memory'"),
        ({EXTRA: "{"}, EXTRA, "JSON object"),
        ({EXTRA: "[1]"}, EXTRA, "JSON object"),
        ({EXTRA: {"x": 1}}, EXTRA, "got x"),
        ({"size": "many"}, "size", "16GiB"),
        ({"size": 0}, "size", "from 1"),
        ({"size": True}, "size", "bytes"),
        ({"directory": ""}, "directory", "not empty"),
        ({"hicache_storage_prefetch_policy": "never"}, "hicache_storage_prefetch_policy", "best_effort"),
        ({"hicache_write_policy": "never"}, "hicache_write_policy", "write_back"),
        ({"timeout": -1}, "timeout", "from 0"),
    ],
)  # fmt: skip
async def test_a_wrong_parameter_is_named(stored: ScriptedEngine, body, param: str, words: str) -> None:
    if param != "hicache_storage_backend":
        body = {"hicache_storage_backend": "file"} | body
    async with api(stored, server_args={"hicache_write_policy": "write_through"}) as server:
        answer = await server.http.put(ROUTE, json=body)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param and words in error["message"]
    assert not stored.of_type(AttachStorage)


async def test_an_engine_that_cannot_attach_is_heard(engine: ScriptedEngine) -> None:
    """The first words must not claim success."""
    engine.script.answers[AttachStorage] = lambda message: Failed(
        call_id=message.call_id, status=400, message="the folder is not ours", param="hicache_storage_backend"
    )
    async with api(engine) as server:
        answer = await server.http.put(ROUTE, json={"hicache_storage_backend": "file", "directory": "/etc"})
    assert answer.status_code == 400 and error_of(answer)["message"] == "the folder is not ours"


async def test_both_policies_reach_the_engine(stored: ScriptedEngine) -> None:
    """SGLang's clients change them at run time; refused, or dropped on the way, the server goes on as before."""
    body = {"hicache_storage_backend": "file", "directory": "/store", "hicache_write_policy": "write_back"}
    async with api(stored, server_args={"hicache_write_policy": "write_through"}) as server:
        assert (await server.http.put(ROUTE, json=body)).status_code == 200
        assert (await server.http.get(ROUTE)).json()["hicache_write_policy"] == "write_back"
    (message,) = stored.of_type(AttachStorage)
    assert (message.write_policy, message.prefetch_policy) == ("write_back", None)


async def test_show_tells_what_the_engine_says(stored: ScriptedEngine) -> None:
    async with api(stored, server_args={"hicache_write_policy": "write_through"}) as server:
        answer = (await server.http.get(ROUTE)).json()
        stored.script.answers[GetStorage] = lambda message: StorageInfo(call_id=message.call_id)
        empty = (await server.http.get(ROUTE)).json()
    assert answer["hicache_storage_backend"] == "file" and answer["hicache_write_policy"] == "write_back"
    assert answer["engines"][0]["num_pages"] == 7
    assert empty["hicache_storage_backend"] is None and empty["hicache_storage_backend_extra_config"] is None


def flushed(message: FlushCache, **fields) -> FlushResult:
    given = {"status": 200, "success": True, "message": "Cache flushed.", "mode": message.mode, "waited_s": 0.1}
    return FlushResult(call_id=message.call_id, **(given | fields))


@pytest.mark.parametrize("path", ["/hicache/storage-backend/clear", "/clear_hicache_storage_backend"])
async def test_clear_flushes_storage_alone_and_at_once(engine: ScriptedEngine, path: str) -> None:
    engine.script.flush = lambda message: flushed(message, still_warm=("device", "host"))
    async with api(engine) as server:
        text = await server.http.post(path)
        answer = (await server.http.post(path + "?timeout=1", headers=JSON)).json()
    assert text.status_code == 200 and text.text.startswith("Hierarchical cache storage backend cleared.")
    assert answer["tiers"] == {"device": "kept", "host": "kept", "storage": "dropped"}
    for message in engine.of_type(FlushCache):
        assert (message.mode, message.tiers) == ("now", ("storage",))


async def test_clear_says_so_while_the_store_has_not_acknowledged(engine: ScriptedEngine) -> None:
    """A 200 would promise that nothing old can come back; the store has not said so."""
    engine.script.flush = lambda message: flushed(message, status=202, pending=("storage",))
    async with api(engine) as server:
        text = await server.http.post(f"{ROUTE}/clear")
        answer = await server.http.post(f"{ROUTE}/clear", headers=JSON)
    assert text.status_code == answer.status_code == 202
    assert "not cleared yet" in text.text and answer.json()["tiers"] == {"storage": "pending"}


async def test_clear_without_a_store_is_refused(engine: ScriptedEngine) -> None:
    engine.script.flush = lambda message: Failed(  # type: ignore[assignment,return-value]
        call_id=message.call_id, status=400, message="tiers: storage is not enabled", param="tiers"
    )
    async with api(engine) as server:
        answer = await server.http.post(f"{ROUTE}/clear")
    assert answer.status_code == 400 and error_of(answer)["param"] == "tiers"
