"""Who may call what, with and without keys."""

from typing import Any

import pytest
from api_under_test import Api, api, error_of

from headwater.http_api.auth import Keys
from headwater.http_api.sites import CHANGING_BY_GET, READING
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio

OPEN = ["/health", "/health_generate", "/ready", "/ping", "/metrics"]
USER = ["/v1/models", "/model_info", "/v1/loads", "/docs", "/openapi.json", "/nowhere"]
CONTROL = ["/flush_cache", "/control/operations", "/control/blockers", "/cache/tree", "/cache/pins"]
COMPUTING = {  # these cost tokens and change nothing
    "/health_generate",
    "/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/v1/responses/input_tokens",
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/api/embeddings",
    "/api/show",
    "/tokenize",
    "/v1/tokenize",
    "/detokenize",
    "/v1/detokenize",
    "/v1/embeddings",
    "/encode",
    "/v1/score",
    "/v1/rerank",
    "/rerank",
}
OF_USERS = {"/v1/responses/{response_id}"}  # changes what a user has stored
USERS_KEY = {"authorization": "Bearer user"}

# api key, admin key, key sent -> expected status of user routes and of control routes; 0: passes
MATRIX = [
    (None, None, None, 0, 0),
    (None, None, "", 0, 0),
    (None, None, "anything", 0, 0),
    ("user", None, None, 401, 401),
    ("user", None, "", 401, 401),
    ("user", None, "wrong", 401, 401),
    ("user", None, "user", 0, 0),
    (None, "admin", None, 0, 401),
    (None, "admin", "admin", 0, 0),
    ("user", "admin", None, 401, 401),
    ("user", "admin", "user", 0, 403),
    ("user", "admin", "admin", 0, 0),
    ("user", "admin", "wrong", 401, 401),
]


@pytest.mark.parametrize(("api_key", "admin_key", "sent", "user_status", "control_status"), MATRIX)
async def test_the_matrix_of_keys_and_routes(engine, api_key, admin_key, sent, user_status, control_status) -> None:
    async with api(engine, api_key=api_key, admin_api_key=admin_key) as server:
        server.app.openapi_schema = {"openapi": "3.1.0"}  # the right one takes a second: it matters who gets it
        headers = {} if sent is None else {"authorization": f"Bearer {sent}"}

        async def status(path: str, method: str = "GET") -> int:
            found = (await server.http.request(method, path, headers=headers)).status_code
            return found if found in (401, 403) else 0

        assert {await status(path) for path in OPEN} == {0}
        assert {await status(path, "OPTIONS") for path in USER + CONTROL} == {0}
        assert {await status(path) for path in USER} == {user_status}
        assert {await status(path) for path in CONTROL} == {control_status}


@pytest.mark.parametrize("header", ["user", "Basic user", "Bearer", "bearer user ", "Bearer  user", "Bearer usér"])
def test_headers_that_are_nearly_right(header: str) -> None:
    """Only the scheme's case and blanks around the key are forgiven."""
    refusal = Keys(api_key="user").user_refusal(header)
    passes = header.split() in (["bearer", "user"], ["Bearer", "user"])
    assert (refusal is None) == passes


async def test_a_key_may_come_as_x_api_key(engine: ScriptedEngine) -> None:
    """Anthropic's clients send it so; a bearer key goes first, and an empty one is none."""
    expected = [
        ({"x-api-key": "user"}, 200, 403),
        ({"x-api-key": "admin"}, 200, 200),
        ({"x-api-key": "wrong"}, 401, 401),
        ({"x-api-key": "usér"}, 401, 401),
        ({"x-api-key": ""}, 401, 401),
        ({"x-api-key": "user", "authorization": "Bearer "}, 200, 403),
        ({"x-api-key": "user", "authorization": "Bearer wrong"}, 401, 401),
        ({"x-api-key": "wrong", "authorization": "Bearer user"}, 200, 403),
    ]
    async with api(engine, api_key="user", admin_api_key="admin") as server:
        for given, user_status, control_status in expected:
            headers = {name: value.encode() for name, value in given.items()}
            paths = ("/v1/models", "/cache/pins")
            found = [(await server.http.get(path, headers=headers)).status_code for path in paths]
            assert found[0] == user_status, given
            assert (found[1] if found[1] in (401, 403) else 200) == control_status, given


async def test_refusals_are_errors_of_the_one_shape_and_have_an_id(engine: ScriptedEngine) -> None:
    async with api(engine, api_key="user", admin_api_key="admin") as server:
        response = await server.http.get("/v1/models", headers={"x-request-id": "my-id"})
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
        assert response.headers["x-request-id"] == "my-id"
        assert response.headers["www-authenticate"] == "Bearer"
        user = {"authorization": "Bearer user"}
        assert (await server.http.get("/v1/models", headers=user)).status_code == 200
        response = await server.http.get("/flush_cache", headers=user)
        assert (response.status_code, error_of(response)["code"]) == (403, "admin_key_required")
        admin = {"authorization": "Bearer admin"}
        assert (await server.http.get("/flush_cache", headers=admin)).status_code == 200


def operations(router: Any) -> set[tuple[str, str]]:
    """(method, path) of every route of the app, hidden ones included. A mounted app has no methods, and fails here."""
    found = set()
    for route in router.routes:
        included = getattr(route, "original_router", None)
        found |= {(method, path_of(route)) for method in route.methods} if included is None else operations(included)
    return found


def path_of(route: Any) -> str:
    """As the documentation spells it."""
    return getattr(route, "path_format", route.path)


async def open_to_users(server: Api) -> set[tuple[str, str]]:
    """(method, path) of the routes that change state, as their methods say, and that a user's key opens."""
    found = set()
    for method, path in operations(server.app):
        is_change = method not in READING or path in CHANGING_BY_GET - COMPUTING
        if is_change and path not in COMPUTING | OF_USERS:
            response = await server.http.request(method, path.replace("{", "").replace("}", ""), headers=USERS_KEY)
            if (response.status_code, response.text.count("admin_key_required")) != (403, 1):
                found.add((method, path))
    return found


async def test_every_route_that_changes_state_needs_the_admin_key(engine: ScriptedEngine) -> None:
    """Whatever its tag, and whether the documentation lists it or not."""
    async with api(engine, api_key="user", admin_api_key="admin") as server:
        schema = (await server.http.get("/openapi.json", headers=USERS_KEY)).json()["paths"]
        listed = {(method.upper(), path) for path, methods in schema.items() for method in methods}
        assert listed <= operations(server.app), "the documentation lists what the app does not have"
        of_users = COMPUTING | OF_USERS
        changing = {(method, path) for method, path in listed if method not in READING and path not in of_users}
        assert len(changing) >= 12
        assert all("403" in schema[path][method.lower()]["responses"] for method, path in changing)
        assert await open_to_users(server) == set()


@pytest.mark.parametrize("is_listed", [True, False])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_a_route_without_the_check_is_found(engine: ScriptedEngine, method: str, *, is_listed: bool) -> None:
    """The test above can fail: for a route of any tag, and for an alias that no documentation shows."""

    async def drop_everything() -> None: ...

    async with api(engine, api_key="user", admin_api_key="admin") as server:
        server.app.add_api_route(
            "/cache/drop", drop_everything, methods=[method], tags=["cache"], include_in_schema=is_listed
        )
        assert await open_to_users(server) == {(method, "/cache/drop")}


async def test_the_reports_of_control_routes_need_the_admin_key_by_every_method(engine: ScriptedEngine) -> None:
    """HEAD routes are added beside those for GET; the front of the cache is open to users."""
    async with api(engine, api_key="user", admin_api_key="admin") as server:
        for path in ("/cache/tree", "/cache/pins", "/control/operations", "/control/blockers", "/get_weights_by_name"):
            for method in ("GET", "HEAD"):
                assert (await server.http.request(method, path, headers=USERS_KEY)).status_code == 403, (method, path)
        assert (await server.http.head("/cache", headers=USERS_KEY)).status_code not in (401, 403)


async def test_a_body_is_not_read_before_the_key(engine: ScriptedEngine) -> None:
    """A client without the key gets no answer that depends on what it sends."""
    async with api(engine, admin_api_key="admin") as server:
        response = await server.http.post("/update_weights_from_disk", content=b"no json")
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key")


async def test_a_slash_at_the_end_is_no_way_around(engine: ScriptedEngine) -> None:
    async with api(engine, api_key="user", admin_api_key="admin") as server:
        response = await server.http.get("/flush_cache/", headers=USERS_KEY, follow_redirects=True)
        assert response.status_code == 403


async def test_an_empty_bearer_token_is_no_error_without_keys(engine: ScriptedEngine) -> None:
    """lm-eval sends one."""
    async with api(engine) as server:
        response = await server.http.get("/v1/models", headers={"authorization": "Bearer "})
        assert response.status_code == 200
