"""Nothing that a client sends is a 500: hostile bodies, values, queries and paths, on every route of the app."""

import asyncio
import functools
import json
import logging
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from api_under_test import Api, api, error_of
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hostile_requests import DEEP, Call, Operations, ask
from loop_engines import LoopEngine, loop_engines

from headwater.generation.errors import ApiError
from headwater.http_api.app import ROUTERS
from headwater.http_api.json_body import parse_json
from headwater.http_api.ollama.schemas import OllamaRequest
from headwater.http_api.openai.conversation import ConversationRequest
from headwater.http_api.openai.schemas import OpenAIRequest
from headwater.http_api.responses.schemas import ResponsesRequest
from headwater.tokenization.json_nesting import MAX_NESTING, is_too_deep

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
FULL = "a" * 390  # nearly the context: an answer that nothing else limits is short
EXAMPLES: dict[str, dict[str, Any]] = {
    "/generate": {"text": "a", "sampling_params": {"max_new_tokens": 1}},
    "/v1/completions": {"prompt": "a"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/responses/input_tokens": {"input": "a"},
    "/api/chat": {"model": "default", "messages": [{"role": "user", "content": FULL}], "stream": False},
    "/api/generate": {"model": "default", "prompt": FULL, "stream": False},
    "/api/embed": {"model": "default", "input": "a"},
    "/api/embeddings": {"model": "default", "prompt": "a"},
    "/api/show": {"model": "default"},
    CHAT: {"messages": MESSAGES, "max_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/v1/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/v1/embeddings": {"input": "a"},
    "/encode": {"text": "a"},
    "/v1/score": {"query": "a", "items": ["b"], "label_token_ids": [1, 2]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/v1/detokenize": {"tokens": [1]},
    "/cache/warm": {"text": "a"},
    "/cache/pin": {"text": "a"},
    "/update_weights_from_disk": {"model_path": "/nowhere"},
    "/update_weight_version": {"new_version": "a"},
    "/get_weights_by_name": {"name": "a"},
    "/hicache/storage-backend": {"hicache_storage_backend": "file", "directory": "/nowhere/at/all"},
    "/load_lora_adapter": {"lora_name": "a", "lora_path": "/nowhere"},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "/nowhere"},
    "/load_lora_adapter_from_tensors": {
        "lora_name": "a", "config_dict": {"r": 4}, "safetensors_path": "/dev/shm/no-such.safetensors"
    },
    "/unload_lora_adapter": {"lora_name": "a"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
    # of a world that is too small for these ranks: a group that could be joined would start processes
    "/init_weights_update_group": {
        "master_address": "127.0.0.1", "master_port": 9, "rank_offset": 7, "world_size": 2, "backend": "gloo",
        "timeout": 0.1,
    },
    "/init_weight_transfer_engine": {
        "init_info": {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 7, "world_size": 2},
        "timeout": 0.1,
    },
    "/update_weights": {"update_info": {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1]]}},
    "/collective_rpc": {"method": "update_weight_version", "args": ["a"]},
    "/update_weights_from_distributed": {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]]},
}  # fmt: skip
# 501: not built. 503: no such store. 504: not done in the time asked for
DECLARED = {501, 503, 504}
SEED = int(os.environ.get("HOSTILE_SEED", "1"))
NUM_RANDOM = int(os.environ.get("HOSTILE_REQUESTS", "30"))  # of each route; more find more


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LoopEngine]:
    """A real one, fake model aside: what the routes let through must not end its loop either."""
    with loop_engines(tmp_path) as (engine,):
        yield engine


@functools.cache
def schema() -> dict[str, Any]:
    """Of all routes: what the documentation leaves out is served all the same."""
    app = FastAPI()
    for number, router in enumerate(ROUTERS):
        for index, route in enumerate(router.routes):
            assert isinstance(route, APIRoute)
            name = f"{number}_{index}"
            app.add_api_route(
                route.path, route.endpoint, methods=route.methods, dependencies=route.dependencies, operation_id=name
            )
    return app.openapi()


TRIED = {  # on /v1/chat/completions and /api/chat, which read them with the same code
    "/v1/completions": OpenAIRequest.model_fields,
    "/v1/messages": ConversationRequest.model_fields,
    "/v1/responses": ConversationRequest.model_fields,
    "/v1/responses/input_tokens": ResponsesRequest.model_fields,
    "/api/generate": OllamaRequest.model_fields,
    "/api/embed": OllamaRequest.model_fields,
    "/api/embeddings": OllamaRequest.model_fields,
}


@functools.cache
def operations() -> Operations:
    return Operations(schema(), EXAMPLES, TRIED)


ENDLESS = "/dashboard/events"  # takes nothing, and its answer has no end
# without the schema, which takes a second, and every process collects this file
ROUTES = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
ALL = [(it.path_format, name.lower()) for it in ROUTES if it.path != ENDLESS for name in sorted(it.methods)]
# other names of a route get its raw bodies and the like, not every value once more
ALIASES = {("/generate", "put"), ("/v1/tokenize", "post"), ("/v1/detokenize", "post")}
NUM_FOR_ALIASES = 50


async def send(server: Api, call: Call) -> None:
    """Sends, and checks that the answer is none of a bug."""
    content_type = call.content_type.encode("latin-1")
    async with asyncio.timeout(30):
        response = await ask(server.app, call.method, call.path, content=call.content, content_type=content_type)
    shown = (call.method, call.path[:200], call.content[:200], response.text[:500])
    assert response.status_code < 500 or response.status_code in DECLARED, shown
    assert "internal error" not in response.text, shown
    if response.status_code >= 400 and call.method != "HEAD" and response.content:
        error = json.loads(response.content)["error"]  # a text in Ollama's API
        assert len(error if isinstance(error, str) else error["message"]) < 2000, shown


@pytest.mark.parametrize(("path", "method"), ALL, ids=[f"{method} {path}" for path, method in ALL])
async def test_no_request_is_a_500(
    engine: LoopEngine, path: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        async with api(engine) as server:
            most = NUM_FOR_ALIASES if (path, method) in ALIASES else None
            for call in islice(operations().calls(path, method), most):
                await send(server, call)
                tracebacks = [record for record in caplog.records if record.exc_info]
                assert not tracebacks, (call, tracebacks)
            assert (await server.http.get("/health")).status_code == 200


@pytest.mark.random
@pytest.mark.parametrize("path", sorted(EXAMPLES))
async def test_no_mixture_of_values_is_a_500(
    engine: LoopEngine, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Values that fit alone, or are read only beside others."""
    method = next(iter(schema()["paths"][path].keys() - {"get"}))
    with caplog.at_level(logging.WARNING):
        async with api(engine) as server:
            for call in operations().random_calls(path, method, seed=SEED, count=NUM_RANDOM):
                await send(server, call)
                assert not [record for record in caplog.records if record.exc_info], call
            assert (await server.http.get("/health")).status_code == 200


def test_every_route_with_a_body_has_an_example() -> None:
    """Without one, hostile values of one member would all be refused for another that is missing."""
    needing = {
        path
        for path, methods in schema()["paths"].items()
        for operation in methods.values()
        if operation.get("requestBody", {}).get("required")
    }
    assert needing <= EXAMPLES.keys()


ARGUMENTS = [
    "[" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP,
    '{"a":' * 800 + "1" + "}" * 800,
    '{"a": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=["open", "deep", "less deep", "digits"])
@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/cache/warm"])
async def test_tool_arguments_nested_without_end_are_no_500(
    engine: LoopEngine, path: str, arguments: str
) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": calls}]
    async with api(engine) as server:
        await send(server, Call("POST", path, json.dumps({"messages": messages}).encode()))


HOSTILE_MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": None}]},
    {"role": "user", "content": [{"type": "text"}]},
    {"role": "user", "content": [None]},
    {"role": "user", "content": [[]]},
    {"role": "user", "content": {"a": 1}},
    {"role": None, "content": "a"},
    {"role": ["user"], "content": "a"},
    {"role": {}, "content": "a"},
    {"role": "\ud800", "content": "a"},
    {"role": "user", "content": "a", "name": {"b": []}},
    {"role": "user", "content": "a", "\ud800": "\ud800"},
    {"role": "user", "content": "\x00<|end|>\x00"},
    {"role": "assistant", "content": "a", "tool_calls": "f"},
    {"role": "assistant", "content": "a", "tool_calls": [None]},
    {"role": "assistant", "content": "a", "tool_calls": [{"function": None}]},
    {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": None, "arguments": 5}}]},
    {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
    {"role": "assistant", "content": "a", "tool_calls": {"function": {}}},
    {"role": "assistant", "content": "a", "reasoning_content": [1], "function_call": 5},
    {"role": "tool", "content": None, "tool_call_id": {}},
]
HOSTILE_TOOLS = [[], [None], ["f"], [{}], [{"function": None}], [{"function": {"name": []}}], {"a": 1}, [[[]]], 5, "f"]
HOSTILE_KWARGS = [{"messages": 5}, {"tools": 5}, {"self": 1}, {"add_generation_prompt": {}}, {"": 1}, {"\ud800": 1}]


@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/cache/warm", "/cache/pin"])
async def test_hostile_messages_and_tools_are_no_500(engine: LoopEngine, path: str) -> None:
    bodies: list[Any] = [{"messages": [message]} for message in HOSTILE_MESSAGES]
    bodies += [{"messages": MESSAGES, "tools": tools} for tools in HOSTILE_TOOLS]
    bodies += [{"messages": MESSAGES, "chat_template_kwargs": kwargs} for kwargs in HOSTILE_KWARGS]
    async with api(engine) as server:
        for body in bodies:
            await send(server, Call("POST", path, json.dumps(body).encode()))


async def test_a_body_nested_too_deeply_says_how_deep_it_may_be(engine: LoopEngine) -> None:
    async with api(engine) as server:
        for path in (CHAT, "/flush_cache"):
            for deep in (b"[" * DEEP, b'{"a":' * 101 + b"1" + b"}" * 101):
                response = await server.http.post(path, content=deep, headers={"content-type": "application/json"})
                assert response.status_code == 400
                assert f"nested deeper than {MAX_NESTING}" in error_of(response)["message"]


def test_nesting_is_told_without_parsing() -> None:
    brackets = "[" * 200
    for text, expected in {
        "[" * 100 + "]" * 100: False,
        "[" * 101 + "]" * 101: True,
        "[]" * 5000: False,
        json.dumps({"text": brackets}): False,
        json.dumps({"text": '"\\' + brackets}): False,
        json.dumps([brackets] * 200): False,
        '"' + brackets: False,
        '{"a":' * 101: True,
        "]" * 200 + "[" * 101: False,
    }.items():
        assert is_too_deep(text.encode()) is expected, text[:50]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"{", "invalid_json"),
        (b"\xff", "invalid_encoding"),
        ("{}".encode("utf-16"), "invalid_encoding"),
        (b"1" * 5000, "invalid_json"),
        (b"[" * 101, "invalid_json"),
    ],
)
def test_what_cannot_be_parsed_is_a_400(data: bytes, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(data)
    assert (caught.value.status, caught.value.code) == (400, code)


def test_a_byte_order_mark_is_forgiven() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
