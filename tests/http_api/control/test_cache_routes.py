"""Showing, warming and pinning the cache over HTTP."""

import msgspec
import pytest
from api_under_test import TOKENIZER, api, error_of

from headwater.kv_events import BlockStored, short_hashes, stored_in_tree
from headwater.messages.base import pack_ids, unpack_ids
from headwater.messages.cache import (
    CacheTree,
    GetCacheTree,
    GetPins,
    GetStorage,
    PinInfo,
    PinPrefix,
    Pins,
    StorageInfo,
    TreeBlocks,
    TreeNode,
    TreeRoot,
    UnpinPrefix,
)
from headwater.messages.control import Done, Failed
from headwater.messages.generation import Generate, OutputMeta, RequestOptions
from headwater.messages.state import GetState
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio


async def test_cache_shows_tiers_hits_and_speeds(engine: ScriptedEngine) -> None:
    counters = {
        "prompt_tokens": 100, "cached_tokens_device": 40, "cached_tokens_host": 20, "cached_tokens_storage": 10,
        "restore_tokens": 20, "restore_bytes": 3000, "restore_seconds": 1.5, "dropped_tokens_host_full": 5,
    }  # fmt: skip

    def state(message: GetState):
        return msgspec.structs.replace(
            engine._state(message.call_id), counters=counters, blockers={"restore": 2}
        )  # fmt: skip

    engine.script.answers[GetState] = state
    engine.script.answers[GetStorage] = lambda m: StorageInfo(call_id=m.call_id, kind="file", breaker="open")
    async with api(engine) as server:
        answer = (await server.http.get("/cache")).json()
    assert answer["hits"]["rate"] == {"device": 0.4, "host": 0.2, "storage": 0.1, "all": pytest.approx(0.7)}
    restore = answer["transfers"]["restore"]
    assert restore == {"tokens": 20, "bytes": 3000, "seconds": 1.5, "bytes_per_s": 2000.0, "in_flight": 2}
    assert answer["dropped_tokens"] == {"host_full": 5}
    assert answer["storage"]["breaker"] == "open" and answer["engines"][0]["storage"]["kind"] == "file"
    device = answer["tiers"]["device"]
    assert (device["capacity_pages"], device["used_pages"], device["evictable_pages"]) == (64, 3, 2)
    assert device["used_bytes"] == 3 * 1024
    assert device["ready_pages"] == 64


async def test_cache_shows_how_much_of_the_host_is_pinned(engine: ScriptedEngine) -> None:
    """An operator who sees no offloads after the start must be able to see why."""

    def state(message: GetState):
        whole = engine._state(message.call_id)
        return msgspec.structs.replace(whole, tiers={"host": msgspec.structs.replace(whole.tiers["device"], ready=7)})

    engine.script.answers[GetState] = state
    engine.script.answers[GetStorage] = lambda message: StorageInfo(call_id=message.call_id)
    async with api(engine) as server:
        answer = (await server.http.get("/cache")).json()
        metrics = (await server.http.get("/metrics")).text
    assert answer["tiers"]["host"]["ready_pages"] == 7
    assert [line.split()[-1] for line in metrics.splitlines() if line.startswith("headwater_pages_ready{")] == ["7.0"]


async def test_cache_without_a_store_and_with_nothing_counted(engine: ScriptedEngine) -> None:
    """No division by nothing, and no store invented."""
    engine.script.answers[GetStorage] = lambda message: StorageInfo(call_id=message.call_id)
    async with api(engine) as server:
        answer = (await server.http.get("/cache")).json()
    assert answer["storage"] is None and answer["engines"][0]["storage"] is None
    assert answer["transfers"]["persist"]["bytes_per_s"] == 0.0


async def test_tree(engine: ScriptedEngine) -> None:
    node = TreeNode(num_tokens=16, first_ids=(1, 2), tiers={"device": 1}, num_hits=3)
    root = TreeRoot(cache_salt="s", extra_key="", weights_id="w0", num_tokens=16, num_nodes=1, children=(node,))
    engine.script.answers[GetCacheTree] = lambda message: CacheTree(
        call_id=message.call_id, roots=(root,), generation=2, is_cut=False
    )
    async with api(engine) as server:
        answer = (await server.http.get("/cache/tree?depth=5")).json()
        too_deep = await server.http.get("/cache/tree?depth=0")
    (one,) = answer["engines"]
    assert one["roots"][0]["children"][0]["first_ids"] == [1, 2] and one["generation"] == 2
    assert engine.of_type(GetCacheTree)[0].depth == 5
    assert too_deep.status_code == 400 and error_of(too_deep)["param"] == "depth"


async def test_tree_with_blocks(engine: ScriptedEngine) -> None:
    """What a mirror of the events begins from: hashes, tokens and the number of the next batch."""
    root = TreeRoot(cache_salt="s", extra_key="k", weights_id="w0", num_tokens=6, num_nodes=2, children=())
    one = TreeBlocks(root=0, block_hashes=b"a" * 16 + b"b" * 16, parent=b"", token_ids=pack_ids([1, 2, 3, 4]),
                     tiers=("device", "host"))  # fmt: skip
    two = TreeBlocks(root=0, block_hashes=b"c" * 16, parent=b"b" * 16, token_ids=pack_ids([5, 6]), tiers=("host",))
    engine.script.answers[GetCacheTree] = lambda message: CacheTree(
        call_id=message.call_id, roots=(root,), generation=2, is_cut=True, block_size=2, blocks=(one, two), epoch="e",
        next_event=7,
    )  # fmt: skip
    async with api(engine) as server:
        plain = (await server.http.get("/cache/tree")).json()["engines"][0]
        (entry,) = (await server.http.get("/cache/tree?blocks=true")).json()["engines"]
    assert "blocks" not in plain and not engine.of_type(GetCacheTree)[0].blocks
    assert (entry["epoch"], entry["next_event"], entry["block_size"], entry["dp_rank"]) == ("e", 7, 2, 0)
    a, b, c = short_hashes([b"a" * 16, b"b" * 16, b"c" * 16])
    names = {
        "block_size": 2, "lora_id": None, "lora_name": None, "cache_salt": "s", "extra_key": "k", "weights_id": "w0"
    }  # fmt: skip
    first = {
        "block_hashes": (a, b), "parent_block_hash": None, "token_ids": [1, 2, 3, 4], "extra_keys": [("s",), None],
        "full_block_hashes": [b"a" * 16, b"b" * 16],
    }  # fmt: skip
    second = {"block_hashes": (c,), "parent_block_hash": b, "token_ids": [5, 6], "full_block_hashes": [b"c" * 16]}
    assert stored_in_tree(entry) == (
        BlockStored(medium="GPU", **first, **names),
        BlockStored(medium="CPU_PINNED", **first, **names),
        BlockStored(medium="CPU_PINNED", **second, **names),
    )


async def test_warm_computes_without_generating(engine: ScriptedEngine) -> None:
    """A text, a batch and token ids; each is a request for no token, in the namespace asked for."""
    engine.script.meta = OutputMeta(prompt_tokens=6, cached_device=1, cached_host=2, cached_storage=1)
    async with api(engine) as server:
        one = (await server.post("/cache/warm", {"text": "abcdef", "cache_salt": "s", "extra_key": "k"})).json()
        two = (await server.post("/cache/warm", {"input_ids": [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]})).json()
    assert one["items"] == [
        {
            "prompt_tokens": 6, "cached_tokens": 4, "computed_tokens": 2, "dp_rank": 0,
            "cached_tokens_details": {"device": 1, "host": 2, "storage": 1},
        }
    ]  # fmt: skip
    assert (two["prompt_tokens"], two["cached_tokens"], two["computed_tokens"]) == (12, 8, 4)
    messages = engine.of_type(Generate)
    assert [message.sampling.max_new_tokens for message in messages] == [0, 0, 0]
    assert messages[0].options == RequestOptions(cache_salt="s", extra_key="k", priority=-100)
    assert unpack_ids(messages[0].prompt_ids).tolist() == TOKENIZER.encode("abcdef")
    assert all(each.options.priority < 0 for each in messages), "it must not overtake those who wait for an answer"


async def test_messages_go_through_the_chat_template_without_the_answers_beginning(engine: ScriptedEngine) -> None:
    """Else the prefix would end in a role that the next turn of the conversation does not have there."""
    async with api(engine) as server:
        answer = await server.post("/cache/warm", {"messages": [{"role": "user", "content": "hi"}]})
    assert answer.status_code == 200
    (message,) = engine.of_type(Generate)
    assert TOKENIZER.decode(unpack_ids(message.prompt_ids).tolist(), skip_special_tokens=False) == "<|user|>hi"


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("warm", {}, "text", "exactly one"),
        ("warm", {"text": "a", "input_ids": [1]}, "text", "exactly one"),
        ("warm", {"input_ids": []}, "input_ids", "empty"),
        ("warm", {"input_ids": [99999]}, "input_ids", "99999"),
        ("warm", {"text": "a", "routed_dp_rank": 3}, "routed_dp_rank", "from 0 to 0"),
        ("warm", {"text": []}, "text", "1 to"),
        ("pin", {"text": "a", "ttl_s": 0}, "ttl_s", "above 0"),
        ("pin", {"text": "a", "ttl_s": 1e12}, "ttl_s", "at most"),
        ("pin", {"text": "a", "tiers": ["host"]}, "tiers", "--enable-hierarchical-cache"),
        ("pin", {"text": "a", "tiers": []}, "tiers", "at least 1"),
        ("pin", {"text": "a", "tiers": ["storage"]}, "tiers", "host"),
        ("pin", {"text": ["a", "b"]}, "text", "one prefix"),
    ],
)
async def test_a_wrong_parameter_is_named(engine: ScriptedEngine, path: str, body, param: str, words: str) -> None:
    async with api(engine, server_args={"enable_hierarchical_cache": False}) as server:
        answer = await server.post(f"/cache/{path}", body)
    error = error_of(answer)
    assert answer.status_code == 400 and error["param"].startswith(param) and words in error["message"]
    assert not engine.of_type(Generate) and not engine.of_type(PinPrefix)


async def test_pin_computes_first_then_pins_and_unpins_by_its_id(engine: ScriptedEngine) -> None:
    """Pinning before computing would pin nothing of a prefix that is not cached yet."""
    item = PinInfo(pin_id="pin-4", num_tokens=16, remaining_s=60.0, cache_salt="s")
    engine.script.answers = {
        PinPrefix: lambda message: Pins(call_id=message.call_id, items=(item,)),
        GetPins: lambda message: Pins(call_id=message.call_id, items=(item,)),
        UnpinPrefix: lambda message: Done(call_id=message.call_id),
    }
    async with api(engine) as server:
        body = {"text": "abc", "ttl_s": 60, "cache_salt": "s", "tiers": ["host", "host"]}
        pinned = (await server.post("/cache/pin", body)).json()
        listed = (await server.http.get("/cache/pins")).json()["pins"]
        ended = await server.http.delete(f"/cache/pin/{pinned['pin_id']}")
    kinds = [type(m) for m in engine.received if isinstance(m, Generate | PinPrefix)]
    assert kinds == [Generate, PinPrefix]
    message = engine.of_type(PinPrefix)[0]
    assert (message.ttl_s, message.cache_salt, message.tiers) == (60.0, "s", ("host",))
    assert message.prompt_ids == engine.of_type(Generate)[0].prompt_ids
    assert listed[0]["pin_id"] == pinned["pin_id"] and pinned["num_tokens"] == 16
    assert ended.status_code == 200 and engine.of_type(UnpinPrefix)[0].pin_id == "pin-4"


async def test_unpinning_what_is_not_pinned_is_a_404(engine: ScriptedEngine) -> None:
    engine.script.answers[UnpinPrefix] = lambda message: Failed(
        call_id=message.call_id, status=404, message="no pin 'x'", param="pin_id"
    )
    async with api(engine) as server:
        for pin_id in ("0.x", "nonsense", "7.pin-1"):
            assert (await server.http.delete(f"/cache/pin/{pin_id}")).status_code == 404


async def test_only_looking_at_the_numbers_is_for_every_key(engine: ScriptedEngine) -> None:
    user = {"authorization": "Bearer user"}
    engine.script.answers[GetStorage] = lambda message: StorageInfo(call_id=message.call_id)
    async with api(engine, api_key="user", admin_api_key="admin") as server:
        assert (await server.http.get("/cache", headers=user)).status_code == 200
        for method, path in (
            ("GET", "/cache/tree"), ("GET", "/cache/pins"), ("POST", "/cache/pin"), ("POST", "/cache/warm"),
            ("DELETE", "/cache/pin/0.a"), ("PUT", "/hicache/storage-backend"), ("DELETE", "/hicache/storage-backend"),
            ("POST", "/hicache/storage-backend/clear"), ("POST", "/clear_hicache_storage_backend"),
        ):  # fmt: skip
            assert (await server.http.request(method, path, headers=user)).status_code == 403, path


async def test_no_store_reaches_the_engine_from_every_api(engine: ScriptedEngine) -> None:
    sampling = {"max_new_tokens": 1}
    async with api(engine) as server:
        await server.post("/generate", {"text": "a", "no_store": True, "sampling_params": sampling})
        await server.post("/v1/completions", {"prompt": "a", "no_store": True, "max_tokens": 1})
        message = {"role": "user", "content": "a"}
        await server.post("/v1/chat/completions", {"messages": [message], "no_store": True, "max_tokens": 1})
        await server.post("/generate", {"text": "a", "sampling_params": sampling})
    assert [message.options.no_store for message in engine.of_type(Generate)] == [True, True, True, False]
