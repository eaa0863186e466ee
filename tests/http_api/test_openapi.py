"""/openapi.json says what every field of a request means: clients are generated from it, and /docs shows it."""

import pytest
from api_under_test import api

from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio


async def test_every_field_of_a_request_is_described(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        document = (await server.http.get("/openapi.json")).json()
    bodies = {name: schema for name, schema in document["components"]["schemas"].items() if "properties" in schema}
    assert len(bodies) > 10
    silent = [
        f"{name}.{field}"
        for name, schema in bodies.items()
        for field, facts in schema["properties"].items()
        if not facts.get("description") and "ValidationError" not in name
    ]
    assert silent == []


async def test_every_route_has_a_summary_and_a_description(engine: ScriptedEngine) -> None:
    async with api(engine) as server:
        paths = (await server.http.get("/openapi.json")).json()["paths"]
    routes = [(path, method, route) for path, methods in paths.items() for method, route in methods.items()]
    assert len(routes) > 30
    bare = [(method, path) for path, method, route in routes if not (route.get("summary") and route.get("description"))]
    assert bare == []
    assert [route["summary"] for *_, route in routes if route["summary"][-1] in ".?"] == []
