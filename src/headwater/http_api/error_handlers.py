"""Exceptions of routes become error answers, in the shape of the route's API."""

from collections.abc import Sequence

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Receive, Scope, Send

from headwater.client.errors import CallFailed, EngineGone, EngineLoading, NoSuchEngine, RidInUse
from headwater.generation.errors import ApiError, ClientLeft, as_api_error, from_validation
from headwater.http_api.error_shapes import error_body


class ErrorResponse(Response):
    """An error in the shape of the API that the request's path belongs to, known when it is sent."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(status_code=error.status)
        self.error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = msgspec.json.encode(error_body(self.error, scope["path"]))
        headers = self.error.headers
        answer = Response(body, self.error.status, media_type="application/json", headers=headers)
        await answer(scope, receive, send)


def error_response(error: ApiError) -> Response:
    return ErrorResponse(error)


def install_error_handlers(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Answer every exception of a route with JSON. Unknown exceptions are logged and answered with 500."""

    async def handle(_: Request, error: Exception) -> Response:
        answer = as_api_error(error)
        assert answer is not None, f"registered for this type: {error!r}"
        return error_response(answer)

    async def handle_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(from_validation(error.errors()))

    async def handle_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            return error_response(_method_not_allowed(request, routes))
        return error_response(_from_http(error))

    async def handle_left(_: Request, error: Exception) -> Response:
        return error_response(ApiError(499, "the client left"))

    async def handle_bug(_: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "internal error; the server's log has the details", code="internal"))

    for kind in (
        ApiError,
        EngineGone,
        EngineLoading,
        CallFailed,
        RidInUse,
        NoSuchEngine,
        ClientLeft,
        ValidationError,
        TimeoutError,
    ):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(RequestValidationError, handle_validation)
    app.add_exception_handler(HTTPException, handle_http)
    app.add_exception_handler(ClientDisconnect, handle_left)
    app.add_exception_handler(Exception, handle_bug)


def _from_http(error: HTTPException) -> ApiError:
    if isinstance(error.__cause__, ApiError):  # the framework wraps what `BodyLimit` raises while it reads
        return error.__cause__
    if error.status_code == 400 and isinstance(error.__cause__, UnicodeDecodeError):
        return ApiError(400, "the body is not valid UTF-8", code="invalid_encoding")
    if error.status_code == 404:
        return ApiError(404, "there is no such route; see /docs", code="not_found")
    return ApiError(error.status_code, str(error.detail), headers=error.headers)


def _method_not_allowed(request: Request, routes: Sequence[BaseRoute]) -> ApiError:
    """Names the methods of all routes with this path: the framework names those of the first one only.

    `/v1/responses/input_tokens` is one path, although `/v1/responses/{response_id}` matches it as well.
    """
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    paths = [getattr(route, "path", None) for route in matching]
    same = [route for route, path in zip(matching, paths, strict=True) if path == paths[0]]
    allowed = ", ".join(sorted({method for route in same for method in getattr(route, "methods", None) or ()}))
    message = f"this route does not take that method; allowed: {allowed}"
    return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
