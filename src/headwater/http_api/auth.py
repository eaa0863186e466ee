"""Keys: who may call which route. A key is sent as `Authorization: Bearer KEY`, or as `x-api-key: KEY`.

| route | no key set | only api key set | admin key set |
|---|---|---|---|
| /health*, /ready, /ping, /metrics, OPTIONS | open | open | open |
| /dashboard, /dashboard/files/*: the page without data | open | open | open |
| control routes (`AdminRoute`) | open | api key | admin key |
| all others | open | api key | api key if set, else open (the admin key opens them as well) |
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from headwater.generation.concurrency import Account
from headwater.generation.errors import ApiError
from headwater.http_api.error_handlers import error_response
from headwater.http_api.json_body import JsonRoute

OPEN_PREFIXES = ("/health", "/ready", "/metrics", "/dashboard/files/")
OPEN_PATHS = frozenset({"/ping", "/dashboard"})
REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"description": "A key is needed: the admin key if one is set, else the API key."},
    403: {"description": "The API key was sent, but this route needs the admin key."},
}


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that the server was started with; None: not set. `api_key` may hold several, separated by commas."""

    api_key: str | None = None
    admin_api_key: str | None = None

    @property
    def api_keys(self) -> tuple[str, ...]:
        return tuple(key.strip() for key in (self.api_key or "").split(",") if key.strip())

    def _is_user(self, key: str) -> bool:
        return any(_equal(key, known) for known in self.api_keys)

    def user_refusal(self, authorization: str) -> ApiError | None:
        """Why a request with this header may call no route that needs a key; None: it may."""
        key = _bearer(authorization)
        if self.api_key is None or self._is_user(key) or _equal(key, self.admin_api_key):
            return None
        return _unauthorized("a valid API key is needed as `Authorization: Bearer <key>` or `x-api-key: <key>`")

    def admin_refusal(self, authorization: str) -> ApiError | None:
        """Why a request that `user_refusal` let through may call no control route; None: it may."""
        key = _bearer(authorization)
        if self.admin_api_key is None or _equal(key, self.admin_api_key):
            return None
        if self._is_user(key):
            return ApiError(403, "this route needs the admin API key", code="admin_key_required")
        return _unauthorized("this route needs the admin API key as `Authorization: Bearer <key>`")


class Accounts:
    """The accounts of the clients: number 0 without a key, then one for each API key, and one for the admin key."""

    def __init__(self, keys: Keys, *, max_running: int | None = None) -> None:
        self._keys = keys
        self.all = [Account(number, max_running=max_running) for number in range(len(keys.api_keys) + 2)]

    def of(self, authorization: str) -> Account:
        """The account of a request with this header that may call a route."""
        key = _bearer(authorization)
        if self._keys.admin_api_key is not None and _equal(key, self._keys.admin_api_key):
            return self.all[-1]
        numbers = (number for number, known in enumerate(self._keys.api_keys, 1) if _equal(key, known))
        return self.all[next(numbers, 0)]


class Authentication:
    """Answers 401 without a valid key, on every path that is not open: also on paths that do not exist."""

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self.app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope["method"], scope["path"]):
            refusal = self._keys.user_refusal(authorization_of(Headers(scope=scope)))
            if refusal is not None:
                await error_response(refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class AdminRoute(JsonRoute):
    """A control route: if an admin key is set, only that key opens it.

    A route class and no dependency: FastAPI reads and parses the body before it asks dependencies.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        options["responses"] = REFUSALS | (options.get("responses") or {})
        super().__init__(*args, **options)

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_admin(request: Request) -> Response:
            keys: Keys = request.app.state.keys
            refusal = keys.admin_refusal(authorization_of(request.headers))
            if refusal is not None:
                raise refusal
            return await handle(request)

        return handle_admin


def control_router(tag: str) -> APIRouter:
    """A router for operations on the engines: every route of it is an `AdminRoute`."""
    return APIRouter(route_class=AdminRoute, tags=[tag])


def authorization_of(headers: Headers) -> str:
    """The `Authorization` header. Without a bearer key in it, `x-api-key` counts, which Anthropic's clients send."""
    authorization = headers.get("authorization", "")
    key = headers.get("x-api-key", "")
    return f"Bearer {key}" if key and not _bearer(authorization) else authorization


def _is_open(method: str, path: str) -> bool:
    return method == "OPTIONS" or path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


def _bearer(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _equal(given: str, expected: str | None) -> bool:
    """Compared in constant time, so that the time of an answer does not show how much of a guess is right."""
    return bool(given) and expected is not None and hmac.compare_digest(given.encode(), expected.encode())


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
