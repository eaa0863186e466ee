"""Grammars on every route: they reach the engine with every answer, and errors name the field as the body spells it."""

from typing import Any

import pytest
from api_under_test import api, error_of

from headwater.grammars.sources import from_choice, from_json_schema, from_regex, json_object
from headwater.messages.generation import Generate
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1})
TEXT = ("/v1/completions", {"prompt": "a", "max_tokens": 1})
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


def grammars(engine: ScriptedEngine) -> list[str | None]:
    found = [None if message.grammar is None else message.grammar.text for message in engine.of_type(Generate)]
    return found


async def test_openai_routes_send_the_grammar_with_every_answer(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        for path, body in (CHAT, TEXT):
            response = await server.post(path, body | {"response_format": NAMED, "n": 2, "temperature": 1})
            assert response.status_code == 200, response.text
        assert grammars(engine) == [from_json_schema(SCHEMA)] * 4
        await server.post(TEXT[0], TEXT[1] | {"prompt": ["a", "b"], "guided_choice": ["x", "y"]})
        await server.post(CHAT[0], CHAT[1] | {"response_format": {"type": "text"}, "regex": ""})
        await server.post(CHAT[0], CHAT[1] | {"structured_outputs": {"json_object": True}, "stream": True})
        assert grammars(engine)[4:] == [from_choice(["x", "y"])] * 2 + [None, json_object()]


async def test_each_prompt_of_a_native_batch_may_have_its_own(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        params = [{"max_new_tokens": 1} | given for given in ({"regex": "a+"}, {}, {"json_schema": "{}"})]
        response = await server.post("/generate", {"text": ["a", "b", "c"], "sampling_params": params})
        assert response.status_code == 200, response.text
        assert grammars(engine) == [from_regex("a+"), None, from_json_schema({})]
        params = {"max_new_tokens": 1, "n": 2, "structural_tag": {"format": {"type": "const_string", "value": "a"}}}
        await server.post("/generate", {"text": "a", "sampling_params": params})
        assert grammars(engine)[3:] == ['start: "a"\n'] * 2


@pytest.mark.parametrize(
    ("path", "body", "param", "reason"),
    [
        (*CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "#: not: "),
        (*CHAT, {"response_format": NAMED, "regex": "a"}, "only one of response_format and regex"),
        (*CHAT, {"response_format": NAMED, "min_tokens": 1}, "min_tokens: must be 0 beside a grammar"),
        (*TEXT, {"guided_regex": "("}, "guided_regex: "),
        (*TEXT, {"guided_choice": "abc"}, "guided_choice"),
        ("/generate", {"text": ["a", "b"]}, {"sampling_params": [{}, {"ebnf": "x"}]}, "sampling_params[1].ebnf: "),
        ("/generate", {"text": "a"}, {"sampling_params": {"regex": "a", "min_new_tokens": 1}}, "min_new_tokens: must"),
        ("/generate", {"text": "a"}, {"json_schema": {}}, "/generate takes sampling_params.json_schema"),
        ("/generate", {"text": "a"}, {"regex": "a"}, "did you mean sampling_params.regex?"),
        ("/generate", {"text": "a"}, {"guided_json": {}}, "/generate takes sampling_params.json_schema"),
    ],
)
async def test_errors_name_the_field(
    engine: ScriptedEngine, path: str, body: dict[str, Any], param: dict[str, Any], reason: str
) -> None:
    async with api(engine) as server:
        response = await server.post(path, body | param)
        assert response.status_code == 400, response.text
        assert reason in error_of(response)["message"]
        assert error_of(response)["param"].partition(".")[0].partition("[")[0] in (*param, "regex")
    assert engine.of_type(Generate) == []
