"""/openapi.json is complete: clients are generated from it, and their calls keep their names."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from api_under_test import api

from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio
OTHER_ERRORS = {"ollama": "OllamaErrorAnswer", "anthropic": "AnthropicErrorAnswer"}
OPERATION_IDS = Path(__file__).with_name("operation_ids.json")


_documents: list[bytes] = []  # the first one: it takes a second, and is the same for every engine


async def document(engine: ScriptedEngine) -> dict[str, Any]:
    if not _documents:
        async with api(engine) as server:
            _documents.append((await server.http.get("/openapi.json")).content)
    return json.loads(_documents[0])


def routes_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By `METHOD /path`."""
    paths = document["paths"].items()
    return {f"{method.upper()} {path}": route for path, methods in paths for method, route in methods.items()}


async def test_calls_keep_their_names(engine: ScriptedEngine) -> None:
    """A generated client names its calls after the operation ids. New ones may be added to the file."""
    routes = routes_of(await document(engine))
    now = {name: route["operationId"] for name, route in routes.items()}
    before = json.loads(OPERATION_IDS.read_text())
    assert {name: now.get(name) for name in before} == before
    assert len(set(now.values())) == len(now)
    assert now.keys() == before.keys(), "a new route: add it to the file"


async def test_every_route_says_what_it_answers_and_how_errors_look(engine: ScriptedEngine) -> None:
    for name, route in routes_of(await document(engine)).items():
        responses = route["responses"]
        assert route["summary"] and "200" in responses, name
        shape = OTHER_ERRORS.get(route["tags"][0], "ErrorAnswer")
        assert responses["default"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{shape}"), name
        assert "422" not in responses, f"{name}: a body that does not fit is a 400"
        assert all(response["description"] for response in responses.values()), name


def references(part: Any) -> set[str]:
    if isinstance(part, dict):
        found = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
        return found.union(*(references(value) for value in part.values()))
    return set().union(*(references(item) for item in part)) if isinstance(part, list) else set()


async def test_references_lead_to_components(engine: ScriptedEngine) -> None:
    whole = await document(engine)
    names = {reference.removeprefix("#/components/schemas/") for reference in references(whole)}
    assert names <= whole["components"]["schemas"].keys()
    assert {"ChatCompletion", "ChatCompletionChunk", "Completion", "ModelList", "FlushAnswer", "ErrorAnswer"} <= names
    assert not [name for name in whole["components"]["schemas"] if "ValidationError" in name]


async def test_a_null_counts_as_left_out_also_in_the_document(engine: ScriptedEngine) -> None:
    """Generated clients write null for what their caller leaves out, and validators would object."""
    components = (await document(engine))["components"]["schemas"]
    chat, sampling = components["ChatCompletionRequest"], components["SamplingInput"]
    assert chat["properties"]["top_logprobs"]["type"] == ["integer", "null"]
    assert {"type": "null"} in chat["properties"]["stream_options"]["anyOf"]
    assert "null" not in chat["properties"]["messages"]["type"], "it is required"
    assert sampling["properties"]["temperature"]["type"] == ["number", "null"]
    nulls = {name: None for name in chat["properties"] if name not in chat["required"]}
    async with api(engine) as server:
        answer = await server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]} | nulls)
    assert answer.status_code == 200, answer.text


async def test_events_are_no_text_in_the_document(engine: ScriptedEngine) -> None:
    """Validators take an event as an object of its fields."""
    routes = routes_of(await document(engine))
    contents = [route["responses"]["200"].get("content", {}) for route in routes.values()]
    found = [content["text/event-stream"] for content in contents if "text/event-stream" in content]
    assert len(found) >= 5 and not [stream for stream in found if "type" in stream["schema"]]


async def test_answers_in_text_are_documented(engine: ScriptedEngine) -> None:
    routes = routes_of(await document(engine))
    for name in ("GET /flush_cache", "PUT /hicache/storage-backend", "DELETE /hicache/storage-backend"):
        assert {"text/plain", "application/json"} <= routes[name]["responses"]["200"]["content"].keys(), name


async def test_query_parameters_have_the_types_that_are_read(engine: ScriptedEngine) -> None:
    """The routes read texts themselves, to refuse them in their own words."""
    parameters = routes_of(await document(engine))["GET /flush_cache"]["parameters"]
    types = {parameter["name"]: parameter["schema"].get("type") for parameter in parameters}
    assert (types["timeout"], types["hold"], types["mode"]) == ("number", "boolean", "string")


async def test_generators_find_no_enum_of_booleans_and_no_default_of_an_object(engine: ScriptedEngine) -> None:
    """openapi-python-client drops a schema that has one, with every route that uses it."""
    components = (await document(engine))["components"]["schemas"]
    assert components["DeletedResponse"]["properties"]["deleted"]["type"] == "boolean"
    assert not re.search(r'"enum": \[(true|false)|"default": \{\}', json.dumps(components))
