"""JSON from clients. Invalid or too deeply nested JSON is a 400 that gives the reason.

Python's parser raises five kinds of errors, some of them only for texts made to find them.
"""

import json
from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from headwater.generation.errors import ApiError
from headwater.http_api.openapi.document import operation_id
from headwater.tokenization.json_nesting import MAX_NESTING, is_too_deep


def parse_json(
    data: bytes, *, what: str = "the body", pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value of a JSON text; `pairs` builds an object from its members. Raises ApiError 400 that names `what`."""
    if is_too_deep(data):
        raise _not_json(f"{what} must not be nested deeper than {MAX_NESTING} levels")
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise _not_json(f"{what} is not valid JSON: {error.msg} at character {error.pos}") from None
    except UnicodeDecodeError:
        raise ApiError(400, f"{what} is not valid UTF-8", code="invalid_encoding") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits
        raise _not_json(f"{what} cannot be read: {error}") from None


def _not_json(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


class JsonRequest(Request):
    """A request whose `json()` is `parse_json`."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json


class JsonRoute(APIRoute):
    """A route whose body is read as above; `operation_id` names it in the document.

    A call with `?model=`, as a fleet with several models reads it, must not reach another model: 404 for any other name
    than the served one and those of adapters, 503 while the model loads.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"generate_unique_id_function": operation_id})

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            if (named := request.query_params.get("model")) is not None:
                request.app.state.services.model.require(named)
            return await handle(JsonRequest(request.scope, request.receive, request._send))

        return handle_json
