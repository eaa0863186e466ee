"""An error has the shape that its API's clients read, also where no route of that API was reached."""

import pytest
from api_under_test import api

from headwater.generation.errors import ApiError, bad_request
from headwater.http_api.error_shapes import error_body
from scripted_engine import ScriptedEngine

pytestmark = pytest.mark.anyio


def test_each_api_has_its_shape() -> None:
    error = bad_request("max_tokens", "max_tokens: must be 1 or more, got 0")
    plain = error.body()["error"]
    assert error_body(error, "/v1/chat/completions") == {"error": plain}
    assert error_body(error, "/v1/messages") == {"type": "error", "error": plain}
    assert error_body(error, "/v1/messages/count_tokens") == {"type": "error", "error": plain}
    assert error_body(error, "/v1/messages_of_others") == {"error": plain}
    assert error_body(error, "/api/chat") == {"error": "max_tokens: must be 1 or more, got 0"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, "authentication_error"), (404, "not_found_error"), (413, "request_too_large"),
     (422, "invalid_request_error"), (429, "rate_limit_error"),
     (500, "api_error"), (503, "api_error"), (504, "timeout_error")],
)  # fmt: skip
def test_anthropics_types_are_those_of_its_sdk(status: int, kind: str) -> None:
    assert error_body(ApiError(status, "no"), "/v1/messages")["error"]["type"] == kind


async def test_refusals_before_a_route_have_the_shape_of_its_api(engine: ScriptedEngine) -> None:
    async with api(engine, api_key="user") as server:
        messages = (await server.post("/v1/messages", {})).json()
        ollama = (await server.post("/api/chat", {})).json()
        plain = (await server.post("/v1/nowhere", {})).json()
        foreign = await server.post("/v1/messages", {}, headers={"origin": "https://evil.example"})
    assert (messages["type"], messages["error"]["type"]) == ("error", "authentication_error")
    assert isinstance(ollama["error"], str)
    assert plain["error"]["code"] == "invalid_api_key"
    assert (foreign.status_code, foreign.json()["error"]["type"]) == (403, "permission_error")
