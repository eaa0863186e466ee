"""Every kind of bad input has its own 4xx that names the parameter and what it accepts; never a 5xx."""

import json
import math
from typing import Any

import httpx
import pytest
from api_under_test import MODEL, TOKENIZER, Api, api, error_of

from headwater.generation.model_facts import RequestLimits
from headwater.messages.generation import Generate
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]


def forced_call(parameters: dict) -> dict:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return {"messages": USER, "tool_choice": "required", "tools": [tool]}



# path, body, parameter at fault, words that must be in the message
GENERATE = [
    ({}, "text", "exactly one of text and input_ids"),
    ({"text": "a", "input_ids": [1]}, "text", "exactly one"),
    ({"text": ""}, "text", "must not be empty"),
    ({"input_ids": []}, "input_ids", "must not be empty"),
    ({"text": []}, "text", "1 to 512 prompts"),
    ({"text": ["a", ""]}, "text", "must not be empty"),
    ({"text": 5}, "text", "valid string"),
    ({"text": {"a": 1}}, "text", "valid string"),
    ({"text": "x" * 256}, "text", "at most 255 tokens"),
    ({"input_ids": [1] * 300}, "input_ids", "at most 255 tokens"),
    ({"input_ids": [1] * 257, "sampling_params": {"max_new_tokens": 0}}, "input_ids", "at most 256 tokens"),
    ({"input_ids": [TOKENIZER.vocab_size]}, "input_ids", f"from 0 to {TOKENIZER.vocab_size - 1}"),
    ({"input_ids": [-1]}, "input_ids", "from 0 to"),
    ({"input_ids": [1, "a"]}, "input_ids[1]", "integer"),
    ({"input_ids": [1.5]}, "input_ids[0]", "integer"),
    ({"text": "a\ud800b"}, "text", "lone surrogate"),
    ({"text": "a", "rid": "x" * 1000}, "rid", "at most 256 characters"),
    ({"text": ["a", "b"], "rid": ["same", "same"]}, "rid", "2 different names"),
    ({"text": "a", "rid": 5}, "rid", "valid string"),
    ({"text": "a", "stream": "perhaps"}, "stream", "boolean"),
    ({"text": "a", "sampling_params": 5}, "sampling_params", ""),
    ({"text": "a", "sampling_params": [{}]}, "sampling_params", "one item for each"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params", "one item for each"),
    ({"text": "a", "top_logprobs_num": 10_000}, "top_logprobs_num", "from 0 to 20"),
    ({"text": "a", "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len", "from -1"),
    ({"text": "a", "return_logprob": True, "token_ids_logprob": [99999]}, "token_ids_logprob", "from 0 to"),
    ({"text": "a", "priority": 2**40}, "priority", "from"),
    ({"text": "a", "cache_salt": "x" * 1000}, "cache_salt", "at most 256 characters"),
    ({"text": "a", "temperature": 0}, "temperature", "did you mean sampling_params.temperature?"),
    ({"text": "a", "cach_salt": "tenant"}, "cach_salt", "did you mean cache_salt?"),
    ({"prompt": "a"}, "prompt", "did you mean text?"),
]
SAMPLING = [
    ({"max_new_tokens": -1}, "max_new_tokens", "0 or more"),
    ({"max_new_tokens": "many"}, "max_new_tokens", "integer"),
    ({"max_new_tokens": 1.5}, "max_new_tokens", "integer"),
    ({"max_new_tokens": math.nan}, "max_new_tokens", ""),
    ({"min_new_tokens": 200}, "min_new_tokens", "from 0 to the most tokens asked for (128)"),
    ({"temperature": math.nan}, "temperature", "from 0 to 100"),
    ({"temperature": math.inf}, "temperature", "from 0 to 100"),
    ({"temperature": -0.1}, "temperature", "from 0 to 100"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "above 0 and at most 1"),
    ({"top_p": 2}, "top_p", "above 0 and at most 1"),
    ({"top_k": -2}, "top_k", "from -1"),
    ({"min_p": 1.1}, "min_p", "from 0 to 1"),
    ({"frequency_penalty": 3}, "frequency_penalty", "from -2 to 2"),
    ({"presence_penalty": -3}, "presence_penalty", "from -2 to 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ({"n": 0}, "n", "from 1 to 128"),
    ({"n": 10**6}, "n", "from 1 to 128"),
    ({"stop": [str(number) for number in range(5000)]}, "stop", "at most 32 strings"),
    ({"stop": "x" * 5000}, "stop", "1 to 1024 characters"),
    ({"stop": ""}, "stop", "1 to 1024 characters"),
    ({"stop": [5]}, "stop[0]", "string"),
    ({"stop": "\udc00"}, "stop", "lone surrogate"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids", "from 0 to"),
    ({"stop_token_ids": [1] * 5000}, "stop_token_ids", "at most 256"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {"1": math.nan}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "from 0 to"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "from 0 to"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a", "integer"),
    ({"logit_bias": {str(number): 1 for number in range(2000)}}, "logit_bias", "at most 1024"),
    ({"sampling_seed": 2**70}, "sampling_seed", "from"),
    ({"regex": "(a"}, "regex", "regex"),
    ({"json_schema": "{"}, "json_schema", "not valid JSON"),
    ({"json_schema": {"not": {}}}, "json_schema", "#: not: cannot be enforced"),
    ({"ebnf": "a ::= b"}, "ebnf", "line 1: rule b is not defined"),
    ({"structural_tag": {"format": {"type": "poem"}}}, "structural_tag", "must be one of const_string"),
    ({"guided_json": {}}, "guided_json", "takes sampling_params.json_schema"),
    ({"temprature": 0}, "temprature", "did you mean temperature?"),
    ({"max_tokens": 5}, "max_tokens", "did you mean max_new_tokens?"),
    ({"seed": 5}, "seed", "did you mean sampling_seed?"),
    ({"no_such": 5}, "no_such", "known are temperature, top_p"),
    ({"\ud800": 5}, "\\ud800", "not known"),
    ({"x" * 10_000: 5}, "x" * 64, "not known"),
]
OPENAI = [
    (CHAT, {"messages": []}, "messages", "at least one message"),
    (CHAT, {}, "messages", "required"),
    (CHAT, {"messages": "hi"}, "messages", "list"),
    (CHAT, {"messages": [5]}, "messages[0]", "dictionary"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages[0].role", "non-empty string"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    (CHAT, forced_call({"required": 5}), "tools[0].function.parameters", "list of names"),
    (CHAT, forced_call({"properties": None, "required": ["a"]}), "tools[0].function.parameters", "object"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages[0].content[0].type", "text only"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "Unicode"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}, "messages", "at most 255 tokens"),
    (CHAT, {"messages": USER, "max_tokens": 0}, "max_tokens", "1 or more"),
    (CHAT, {"messages": USER, "max_completion_tokens": -5}, "max_completion_tokens", "1 or more"),
    (CHAT, {"messages": USER, "temperature": -1}, "temperature", "from 0 to 100"),
    (CHAT, {"messages": USER, "top_p": 0}, "top_p", "above 0"),
    (CHAT, {"messages": USER, "n": 0}, "n", "from 1"),
    (CHAT, {"messages": USER, "top_logprobs": 2}, "top_logprobs", "logprobs"),
    (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
    (CHAT, {"messages": USER, "tool_choice": "required"}, "tool_choice", "needs tools"),
    (CHAT, {"messages": USER, "tool_choice": {"type": "function", "function": {"name": "f"}}},
     "tool_choice", "no tool has the name 'f'"),
    (CHAT, {"messages": USER, "tool_choice": "maybe"}, "tool_choice", "'auto', 'none', 'required' or"),
    (CHAT, {"messages": USER, "response_format": {"type": "xml"}}, "response_format", "must be 'text', 'json_object'"),
    (CHAT, {"messages": USER, "stream_options": 5}, "stream_options", ""),
    (CHAT, {"messages": USER, "tools": "f"}, "tools", "list"),
    (CHAT, {"messages": USER, "model": 5}, "model", "string"),
    (CHAT, {"messages": USER, "max_new_tokens": 5}, "max_new_tokens", "did you mean max_tokens?"),
    (CHAT, {"messages": USER, "temprature": 0}, "temprature", "did you mean temperature?"),
    (CHAT, {"messages": USER, "documents": [{"text": "d"}]}, "documents", "no place for documents"),
    (CHAT, {"messages": USER, "echo": True}, "echo", "not supported"),
    ("/v1/completions", {"prompt": "a", "messages": USER}, "messages", "did you mean prompt"),
    ("/v1/completions", {"prompt": "a", "sampling_params": {"temperature": 0}}, "sampling_params", "top of the body"),
    ("/v1/completions", {}, "prompt", "required"),
    ("/v1/completions", {"prompt": ""}, "prompt", "must not be empty"),
    ("/v1/completions", {"prompt": []}, "prompt", "must not be empty"),
    ("/v1/completions", {"prompt": [[]]}, "prompt", "must not be empty"),
    ("/v1/completions", {"prompt": [[1], [99999]]}, "prompt", "from 0 to"),
    ("/v1/completions", {"prompt": {"a": 1}}, "prompt", "string"),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, "max_tokens", "0 or more"),
    ("/v1/completions", {"prompt": "a", "best_of": 5}, "best_of", "1 or n"),
    ("/v1/completions", {"prompt": "a", "logprobs": 50}, "logprobs", "from 0 to 20"),
    ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    ("/v1/completions", {"prompt": "a", "min_tokens": 17}, "min_tokens", "asked for (16)"),
]  # fmt: skip


async def check(server: Api, path: str, body: Any, param: str, words: str) -> None:
    """Sent as Python's json writes it: NaN, Infinity and lone surrogates included."""
    response = await server.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 400, (body, response.text)
    error = error_of(response)
    assert error["param"] == param, (body, error)
    assert words in error["message"], (body, error)
    assert param.split("[")[0].split(".")[0] in error["message"], (body, error)
    assert error["type"] == "invalid_request_error"


async def test_generate_refuses_bad_bodies_by_name(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for body, param, words in GENERATE:
            await check(server, "/generate", body, param, words)
            if "stream" not in body:
                await check(server, "/generate", body | {"stream": True}, param, words)
    assert engine.of_type(Generate) == [], "nothing bad reaches the engine"


async def test_generate_refuses_bad_sampling_by_name(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for sampling, param, words in SAMPLING:
            at_fault = param if words.startswith("from 0 to the most") else None
            if param in ("stop_token_ids", "logit_bias") and words == "from 0 to":
                at_fault = param
            name = at_fault or f"sampling_params.{param}"
            await check(server, "/generate", {"text": "a", "sampling_params": sampling}, name, words)
    assert engine.of_type(Generate) == []


async def test_openai_routes_refuse_bad_bodies_by_name(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for path, body, param, words in OPENAI:
            await check(server, path, body, param, words)
    assert engine.of_type(Generate) == []


@pytest.mark.parametrize("path", ["/generate", CHAT, "/v1/completions", "/tokenize", "/abort_request"])
async def test_what_is_no_json_object_is_a_400(engine: ScriptedEngine, path: str) -> None:
    json_type = {"content-type": "application/json"}
    async with api(engine) as server:
        for content, headers, words in (
            (b'{"text": ', json_type, "not valid JSON"),
            (b'{"text": "\xff\xfe"}', json_type, "not valid UTF-8"),
            (b"[1, 2]", json_type, ""),
            (b"5", json_type, ""),
            (b'"text"', json_type, ""),
            (b"[" * 100_000, json_type, ""),
            (b'{"a": ' + b"9" * 5000 + b"}", json_type, ""),
            (b'{"text": "a"}', {"content-type": "text/plain"}, "content-type: application/json"),
            (b"text=a", {"content-type": "application/x-www-form-urlencoded"}, "content-type"),
            (b'{"text": "a"}', {}, "content-type: application/json"),
        ):
            response = await server.http.post(path, content=content, headers=headers)
            assert response.status_code == 400, (content[:50], response.text)
            assert words in error_of(response)["message"]


async def test_a_missing_body_is_a_400(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for path in ("/generate", CHAT, "/v1/completions", "/tokenize", "/detokenize"):
            assert (await server.http.post(path)).status_code == 400


async def test_a_body_over_the_limit_is_413_announced_or_not(engine: ScriptedEngine) -> None:
    async def in_pieces():
        for _ in range(40):
            yield b"x" * (256 << 10)

    async with api(engine) as server:
        response = await server.http.post("/generate", content=b" " * (10 << 20))
        assert response.status_code == 413
        assert str(4 << 20) in error_of(response)["message"]
        assert (await server.http.post("/generate", content=in_pieces())).status_code == 413
        assert (await server.http.post("/flush_cache", content=in_pieces())).status_code == 413
        assert (await server.http.post("/nowhere", content=b" " * (10 << 20))).status_code == 413
    async with api(engine, limits=RequestLimits(max_body_bytes=100)) as server:
        assert (await server.http.post("/generate", content=b" " * 101)).status_code == 413


async def test_unknown_models_routes_and_methods(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for path, body in ((CHAT, {"messages": USER}), ("/v1/completions", {"prompt": "a"})):
            response = await server.post(path, body | {"model": "gpt-99"})
            assert response.status_code == 404
            error = error_of(response)
            assert (error["code"], error["param"]) == ("model_not_found", "model")
            assert "gpt-99" in error["message"]
            assert MODEL in error["message"]
        response = await server.http.get("/v1/models/gpt-99")
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
        response = await server.http.get("/nowhere")
        assert (response.status_code, error_of(response)["code"]) == (404, "not_found")
        response = await server.http.get("/generate")
        assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
        for method in ("TRACE", "QUERY", "DELETE", "PATCH"):
            response = await server.http.request(method, "/v1/models")
            assert response.status_code == 405
            error_of(response)


async def test_a_bug_is_a_500_without_a_stack_trace(engine: ScriptedEngine, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("headwater.http_api.native.routes.json_bytes", broken)
    async with api(engine) as server:
        response: httpx.Response = await server.post("/tokenize", {"prompt": "a"})
    assert response.status_code == 500
    assert "secret detail" not in response.text
    assert error_of(response)["code"] == "internal"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/hicache/storage-backend", "DELETE, GET, HEAD, PUT"),
        ("/generate", "POST, PUT"),
        ("/resume_memory_occupation", "GET, POST"),
        ("/v1/responses/input_tokens", "POST"),  # not those of /v1/responses/{response_id}, which matches as well
        ("/v1/responses/resp_1", "DELETE, GET, HEAD"),
    ],
)
async def test_a_405_names_every_method_of_the_path(engine: ScriptedEngine, path: str, allowed: str) -> None:
    """The framework names those of the first route that it finds."""
    async with api(engine) as server:
        response = await server.http.request("PATCH", path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)
    assert allowed in error_of(response)["message"]
