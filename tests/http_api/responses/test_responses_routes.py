"""Responses as OpenAI's clients send and read them, through the app."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from api_under_test import MODEL, TOKENIZER, api, calling, error_of, named_events, saying, until
from msgspec import structs
from openai.types.responses import Response

from headwater.generation.model_facts import RequestLimits
from headwater.messages.base import unpack_ids
from headwater.messages.cache import GetStorage, StorageInfo
from headwater.messages.generation import Finish, Generate, OutputMeta
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
PATH = "/v1/responses"
TOOL = {"type": "function", "name": "f"}
JSON = {"content-type": "application/json"}


def prompt_text(engine: ScriptedEngine) -> str:
    newest = engine.of_type(Generate)[-1]
    return TOKENIZER.decode(unpack_ids(newest.prompt_ids).tolist(), skip_special_tokens=False)


async def test_a_response_repeats_its_request(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    engine.script.meta = OutputMeta(prompt_tokens=4, cached_device=3)
    body = {"model": MODEL, "input": "hi", "instructions": "be kind", "temperature": 0.5, "metadata": {"a": "b"}}
    async with api(engine) as server:
        answer = (await server.post(PATH, body)).json()
    response = Response.model_validate(answer)
    assert response.output_text == "hello"
    assert (response.status, response.model, response.instructions) == ("completed", MODEL, "be kind")
    assert (response.temperature, response.top_p, response.metadata) == (0.5, 1.0, {"a": "b"})
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens == 3
    assert prompt_text(engine) == "<|user|>be kind<|user|>hi<|assistant|>"
    assert engine.of_type(Generate)[0].rid == response.id, "a client can abort by the id"


async def test_a_conversation_goes_on_from_a_stored_response(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("one")
    async with api(engine) as server:
        first = (await server.post(PATH, {"input": "a", "instructions": "not carried over"})).json()
        engine.script.reply = saying("two")
        second = (await server.post(PATH, {"input": "b", "previous_response_id": first["id"]})).json()
        await server.http.delete(f"{PATH}/{first['id']}")
        stream = {"input": "c", "previous_response_id": second["id"], "stream": True}
        third = named_events(await server.post(PATH, stream))[-1]["response"]
        assert prompt_text(engine) == "<|user|>a<|user|>one<|user|>b<|user|>two<|user|>c<|assistant|>"
        assert third["previous_response_id"] == second["id"]
        shown = (await server.http.get(f"{PATH}/{third['id']}")).json()
        gone = await server.http.get(f"{PATH}/{first['id']}")
        lost = await server.post(PATH, {"input": "b", "previous_response_id": first["id"]})
        other = await server.post(PATH, {"input": "b", "previous_response_id": second["id"], "cache_salt": "x"})
    assert shown == third
    assert gone.status_code == 404
    for response in (lost, other):
        assert (response.status_code, error_of(response)["code"]) == (404, "previous_response_not_found")


async def test_a_key_does_not_open_the_responses_of_another(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("one")
    red, blue = ({"authorization": f"Bearer {key}"} for key in ("red", "blue"))
    async with api(engine, api_key="red,blue") as server:
        path = f"{PATH}/{(await server.post(PATH, {'input': 'a'}, headers=red)).json()['id']}"
        for call in (server.http.get, server.http.delete):
            assert (await call(path, headers=blue)).status_code == 404
        body = {"input": "b", "previous_response_id": path.rpartition("/")[2]}
        assert (await server.post(PATH, body, headers=blue)).status_code == 404
        assert (await server.post(PATH, body, headers={"x-api-key": "red"})).status_code == 200
        assert (await server.http.delete(path, headers=red)).status_code == 200


async def test_a_call_of_a_tool_and_its_result(engine: ScriptedEngine) -> None:
    engine.ready = structs.replace(engine.ready, max_context=4096, num_pages=512)
    engine.script.reply = calling("f", {"at": "é"})
    async with api(engine) as server:
        first = (await server.post(PATH, {"input": "a", "tools": [TOOL]})).json()
        streamed = named_events(await server.post(PATH, {"input": "a", "tools": [TOOL], "stream": True}))
        result = {"type": "function_call_output", "call_id": first["output"][1]["call_id"], "output": "a river"}
        body = {"input": [result], "tools": [TOOL], "previous_response_id": first["id"]}
        assert (await server.post(PATH, body)).status_code == 200
    said, call = first["output"]
    assert said["content"][0]["text"] == "Well:"
    assert (call["name"], json.loads(call["arguments"])) == ("f", {"at": "é"})
    assert streamed[-1]["response"]["output"][1]["arguments"] == call["arguments"]
    text = prompt_text(engine)
    assert text.index("Well:") < text.index("é") < text.index("a river")


async def test_counting_tokens_is_counting_the_prompt(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("one")
    async with api(engine) as server:
        first = (await server.post(PATH, {"input": "a"})).json()
        body = {"input": "b", "instructions": "be kind", "previous_response_id": first["id"]}
        counted = (await server.post(f"{PATH}/input_tokens", body)).json()
        answer = (await server.post(PATH, body)).json()
        unknown = await server.post(f"{PATH}/input_tokens", body | {"model": "other"})
    assert counted == {"object": "response.input_tokens", "input_tokens": answer["usage"]["input_tokens"]}
    assert (unknown.status_code, error_of(unknown)["param"]) == (404, "model")
    assert len(engine.of_type(Generate)) == 2


async def test_what_is_not_stored_is_gone(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("one")
    async with api(engine, limits=RequestLimits(max_stored_responses=1)) as server:
        first = (await server.post(PATH, {"input": "a"})).json()
        assert (await server.post(PATH, {"input": "a", "store": False})).status_code == 200
        assert (await server.http.get(f"{PATH}/{first['id']}")).status_code == 200
        await server.post(PATH, {"input": "a"})
        assert (await server.http.get(f"{PATH}/{first['id']}")).status_code == 404
        deleted = await server.http.delete(f"{PATH}/{first['id']}")
    assert deleted.status_code == 404


async def test_an_operator_sees_and_drops_what_is_stored(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("one")
    engine.script.answers = {GetStorage: lambda message: StorageInfo(call_id=message.call_id)}
    async with api(engine) as server:
        id = (await server.post(PATH, {"input": "a"})).json()["id"]
        stored = (await server.http.get("/cache")).json()["stored_responses"]
        assert stored["responses"] == 1
        assert 0 < stored["bytes"] <= stored["max_bytes"]
        page = (await server.http.get("/metrics")).text
        assert f'headwater_stored_response_bytes{{model_name="{MODEL}"}} {stored["bytes"]:.1f}' in page
        dropped = (await server.http.delete("/cache/responses")).json()
        assert dropped == {"success": True, "dropped": 1, "bytes": stored["bytes"]}
        assert (await server.http.get(f"{PATH}/{id}")).status_code == 404
        assert (await server.http.get("/cache")).json()["stored_responses"]["bytes"] == 0


async def test_input_items_in_pages(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("one")
    items = [{"role": "user", "content": text} for text in "abc"]
    async with api(engine) as server:
        id = (await server.post(PATH, {"input": items})).json()["id"]
        page = (await server.http.get(f"{PATH}/{id}/input_items", params={"limit": 2})).json()
        assert [item["content"][0]["text"] for item in page["data"]] == ["c", "b"]
        assert page["has_more"] is True
        rest = (await server.http.get(f"{PATH}/{id}/input_items", params={"after": page["last_id"]})).json()
        assert [item["content"][0]["text"] for item in rest["data"]] == ["a"]
        assert rest["has_more"] is False
        wrong = await server.http.get(f"{PATH}/{id}/input_items", params={"after": "nothing"})
    assert error_of(wrong)["param"] == "after"


async def test_an_item_of_a_stored_response_can_be_named(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("one")
    async with api(engine) as server:
        (item,) = (await server.post(PATH, {"input": "a"})).json()["output"]
        reference = [{"role": "user", "content": "a"}, {"type": "item_reference", "id": item["id"]}]
        await server.post(PATH, {"input": [*reference, {"role": "user", "content": "b"}]})
    assert prompt_text(engine) == "<|user|>a<|user|>one<|user|>b<|assistant|>"


async def test_logprobs_of_a_stream_are_those_of_the_whole(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hé")
    body = {"input": "a", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    async with api(engine) as server:
        whole = (await server.post(PATH, body)).json()["output"][0]["content"][0]["logprobs"]
        events = named_events(await server.post(PATH, body | {"stream": True}))
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * len(whole)
    assert whole[0]["token"] == "h"
    assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == whole
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert done["logprobs"] == whole


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": "a", "background": True}, 400, "background"),
        ({"input": []}, 400, "input"),
        ({"input": "a" * 300}, 400, "input"),
        ({}, 400, "input"),
        ({"input": "a", "model": "other"}, 404, "model"),
        ({"input": "a", "previous_response_id": "gone"}, 404, "previous_response_id"),
        ({"input": [{"role": "user", "content": "a", "note": "\ud800"}]}, 400, "input"),
        ({"input": "a", "tool_choice": "none", "tools": [TOOL | {"x": "\udfff"}]}, 400, "tools"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors(engine: ScriptedEngine, body: dict[str, Any], status: int, param: str, *, stream: bool) -> None:
    async with api(engine) as server:
        response = await server.http.post(PATH, content=json.dumps(body | {"stream": stream}), headers=JSON)
    assert (response.status_code, error_of(response)["param"]) == (status, param)
    assert engine.of_type(Generate) == []


async def test_a_stream_cannot_be_read_again(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        response = await server.http.get(f"{PATH}/x", params={"stream": "true"})
    assert (response.status_code, error_of(response)["param"]) == (400, "stream")


async def test_an_engine_that_refuses_is_an_error_also_for_a_stream(engine: ScriptedEngine) -> None:
    engine.script.refusal = Finish(type="abort", status=429, message="the queue is full")
    async with api(engine) as server:
        for stream in (False, True):
            response = await server.post(PATH, {"input": "a", "stream": stream})
            assert (response.status_code, error_of(response)["type"]) == (429, "rate_limit_error")


async def test_an_aborted_stream_ends_with_a_failed_response(engine: ScriptedEngine) -> None:
    engine.script.step_s = 0.01
    async with api(engine) as server:
        body = {"input": "a", "stream": True, "rid": "mine", "ignore_eos": True}
        running = asyncio.ensure_future(server.post(PATH, body))
        await until(lambda: engine.num_running)
        await asyncio.sleep(0.05)
        await server.post("/abort_request", {"rid": "mine"})
        events = named_events(await running)
    assert events[-1]["type"] == "response.failed"
    assert "ended before its answer was whole" in events[-1]["response"]["error"]["message"]


async def test_the_sdk_reads_both_forms(engine: ScriptedEngine) -> None:
    engine.script.reply = saying("hello")
    async with api(engine) as server:
        transport = httpx.ASGITransport(server.app)
        http = httpx.AsyncClient(transport=transport, base_url="http://test")
        client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http)
        response = await client.responses.create(model=MODEL, input="hi")
        assert response.output_text == "hello"
        async with client.responses.stream(model=MODEL, input="hi") as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[0] == "response.created"
        assert final.output_text == "hello"
        assert (await client.responses.retrieve(response.id)).output_text == "hello"
        assert (await client.responses.input_items.list(response.id)).data
        await client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)
