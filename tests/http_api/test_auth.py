"""Who may call what, with and without keys."""

import pytest
from api_under_test import api, error_of

from headwater.http_api.auth import Authentication
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio

OPEN = ["/health", "/health_generate", "/ready", "/ping", "/metrics"]
USER = ["/v1/models", "/model_info", "/v1/loads", "/docs", "/openapi.json", "/nowhere"]
CONTROL = ["/flush_cache", "/flush_cache/", "/control/operations", "/control/blockers", "/reset_prefix_cache"]

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
def test_the_matrix_of_keys_and_routes(api_key, admin_key, sent, user_status, control_status) -> None:
    async def app(*_: object) -> None: ...

    auth = Authentication(app, api_key=api_key, admin_api_key=admin_key)
    header = "" if sent is None else f"Bearer {sent}"

    def status(path: str, method: str = "GET") -> int:
        refusal = auth.refusal(method, path, header)
        return 0 if refusal is None else refusal.status

    assert {status(path) for path in OPEN} == {0}
    assert {status(path, "OPTIONS") for path in USER + CONTROL} == {0}
    assert {status(path) for path in USER} == {user_status}
    assert {status(path) for path in CONTROL} == {control_status}


@pytest.mark.parametrize("header", ["user", "Basic user", "Bearer", "bearer user ", "Bearer  user", "Bearer usér"])
def test_headers_that_are_nearly_right(header: str) -> None:
    """Only the scheme's case and blanks around the key are forgiven."""

    async def app(*_: object) -> None: ...

    refusal = Authentication(app, api_key="user", admin_api_key=None).refusal("GET", "/v1/models", header)
    passes = header.split() in (["bearer", "user"], ["Bearer", "user"])
    assert (refusal is None) == passes


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


async def test_every_route_that_changes_the_engine_is_a_control_route(engine: ScriptedEngine) -> None:
    """A new control route that is not listed would be open to every user."""
    async with api(engine, api_key="user", admin_api_key="admin") as server:
        paths = (await server.http.get("/openapi.json", headers={"authorization": "Bearer user"})).json()["paths"]
        for path, methods in paths.items():
            for method, route in methods.items():
                if "control" in route["tags"]:
                    response = await server.http.request(
                        method, path.replace("{operation_id}", "x"), headers={"authorization": "Bearer user"}
                    )
                    assert response.status_code == 403, path


async def test_an_empty_bearer_token_is_no_error_without_keys(engine: ScriptedEngine) -> None:
    """lm-eval sends one."""
    async with api(engine) as server:
        response = await server.http.get("/v1/models", headers={"authorization": "Bearer "})
        assert response.status_code == 200
