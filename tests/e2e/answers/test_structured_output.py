"""Grammars with the real default model through every route: an answer that ends by itself matches, whatever it says."""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from running_server import RunningServer

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("default server")]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 12, "pattern": "^[A-Z][a-z ]*$"},
        "inhabitants": {"type": "integer", "minimum": 1000, "maximum": 40_000_000},
        "continent": {"enum": ["Asia", "Europe", "Africa", "elsewhere"]},
        "rivers": {"type": "array", "items": {"$ref": "#/$defs/river"}, "maxItems": 2},
    },
    "required": ["city", "inhabitants", "continent", "rivers"],
    "additionalProperties": False,
    "$defs": {
        "river": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 10}, "is_long": {"type": "boolean"}},
            "required": ["name", "is_long"],
            "additionalProperties": False,
        }
    },
}
MESSAGES: list[Any] = [{"role": "user", "content": "Describe a city."}]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
TAG = {"format": {"type": "tag", "begin": "<city>", "content": {"type": "json_schema", "json_schema": SCHEMA},
                  "end": "</city>"}}  # fmt: skip


def check(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    url = server.url + "/v1"
    with openai.OpenAI(base_url=url, api_key="not-needed", max_retries=0, timeout=120) as client:
        yield client


def test_chat_answers_are_instances_of_the_schema(client: openai.OpenAI) -> None:
    """Several at once, drawn at a high temperature: each has a state of its own."""
    answer = client.chat.completions.create(
        model="default", messages=MESSAGES, response_format=FORMAT, n=6, temperature=1.5, max_tokens=400, seed=1
    )
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 6
    texts = [choice.message.content or "" for choice in answer.choices]
    for text in texts:
        check(text)
    assert len(set(texts)) > 1


def test_streamed_and_with_logprobs(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="default", messages=MESSAGES, response_format=FORMAT, temperature=0, max_tokens=400, stream=True,
        logprobs=True, top_logprobs=1,
    )  # fmt: skip
    chunks = [chunk for chunk in stream if chunk.choices]
    check("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_every_way_to_ask(client: openai.OpenAI, server: RunningServer) -> None:
    def complete(**fields: Any) -> str:
        body = {"max_tokens": 400, "seed": 3} | fields
        (choice,) = client.completions.create(model="default", prompt="The city is", extra_body=body).choices
        assert choice.finish_reason == "stop", choice
        return choice.text

    def generate(**fields: Any) -> str:
        params = {"max_new_tokens": 400, "sampling_seed": 5, "ignore_eos": True} | fields
        answer = server.post("/generate", json={"text": "The city is", "sampling_params": params}).json()
        assert answer["meta_info"]["finish_reason"]["type"] == "stop", answer
        return answer["text"]

    check(complete(guided_json=SCHEMA))
    check(complete(structured_outputs={"json": json.dumps(SCHEMA), "disable_any_whitespace": True}))
    check(generate(json_schema=json.dumps(SCHEMA)))
    assert complete(guided_choice=["Rome", "Paris", "New York"]) in ("Rome", "Paris", "New York")
    assert re.fullmatch(r"[0-9]{3}-[a-z]{2,5}!", complete(regex=r"[0-9]{3}-[a-z]{2,5}!"))
    assert re.fullmatch(r"[0-9]{3}-[a-z]{2,5}!", generate(regex=r"[0-9]{3}-[a-z]{2,5}!"))
    assert re.fullmatch(r"(yes|no)(,(yes|no)){2}", generate(ebnf='root ::= w "," w "," w\nw ::= "yes" | "no"'))
    tagged = generate(structural_tag=json.dumps(TAG))
    assert tagged.startswith("<city>")
    check(tagged.removeprefix("<city>").removesuffix("</city>"))
    params = [{"max_new_tokens": 8, "regex": "a{3}"}, {"max_new_tokens": 4, "temperature": 0}]
    body = {"text": ["x", "The capital of France is"], "sampling_params": params}
    masked, free = server.post("/generate", json=body).json()
    assert masked["text"] == "aaa"
    assert "Paris" in free["text"]


def test_any_json_object_parses_if_it_ends(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default", messages=MESSAGES, response_format={"type": "json_object"}, n=4, max_tokens=150, seed=2
    )
    for choice in answer.choices:
        text = choice.message.content or ""
        assert text.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_what_ends_an_answer_early_still_does(server: RunningServer) -> None:
    params = {"max_new_tokens": 3, "json_schema": SCHEMA}
    answer = server.post("/generate", json={"text": "a", "sampling_params": params}).json()
    assert answer["meta_info"]["finish_reason"]["type"] == "length"
    params = {"max_new_tokens": 100, "json_schema": SCHEMA, "stop": "city"}
    answer = server.post("/generate", json={"text": "a", "sampling_params": params}).json()
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "city"}


def test_a_schema_that_cannot_be_enforced_is_refused_by_name(client: openai.OpenAI) -> None:
    refused: Any = {"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"not": {}}}}}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="default", messages=MESSAGES, response_format=refused)
    assert error.value.param == "response_format"
    assert "#/properties/a: not" in error.value.message
