"""Bearer keys: who may call which route.

| route | no key set | only api key set | admin key set |
|---|---|---|---|
| /health*, /ready, /ping, /metrics, OPTIONS | open | open | open |
| control routes | open | api key | admin key |
| all others | open | api key | api key if set, else open (the admin key opens them, too) |
"""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from headwater.generation.errors import ApiError
from headwater.http_api.error_handlers import error_response

OPEN_PREFIXES = ("/health", "/ready", "/metrics")
OPEN_PATHS = frozenset({"/ping"})
CONTROL_PREFIXES = ("/control/", "/hicache/", "/cache/")
CONTROL_PATHS = frozenset(
    {
        "/flush_cache",
        "/clear_hicache_storage_backend",
        "/reset_prefix_cache",
        "/pause_generation",
        "/continue_generation",
        "/abort_request",
        "/update_weights_from_disk",
        "/update_weight_version",
        "/get_weights_by_name",
        "/release_memory_occupation",
        "/resume_memory_occupation",
    }
)


def is_open(method: str, path: str) -> bool:
    return method == "OPTIONS" or path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


def is_control(path: str) -> bool:
    return path.rstrip("/") in CONTROL_PATHS or path.startswith(CONTROL_PREFIXES)


class Authentication:
    """Answers 401 without a valid key, and 403 when a user's key tries a control route."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, admin_api_key: str | None) -> None:
        self.app = app
        self.api_key = api_key
        self.admin_api_key = admin_api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self.refusal(scope["method"], scope["path"], Headers(scope=scope).get("authorization", ""))
            if refusal is not None:
                await error_response(refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def refusal(self, method: str, path: str, authorization: str) -> ApiError | None:
        """Why this request may not pass, or None."""
        if is_open(method, path):
            return None
        key = _bearer(authorization)
        is_user, is_admin = _equal(key, self.api_key), _equal(key, self.admin_api_key)
        if is_control(path) and self.admin_api_key is not None:
            if is_admin:
                return None
            if is_user:
                return ApiError(403, "this route needs the admin API key", code="admin_key_required")
            return _unauthorized("this route needs the admin API key as `Authorization: Bearer <key>`")
        if self.api_key is None or is_user or is_admin:
            return None
        return _unauthorized("a valid API key is needed as `Authorization: Bearer <key>`")


def _bearer(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _equal(given: str, expected: str | None) -> bool:
    """Compared in constant time, so that answers do not tell how much of a guess is right."""
    return bool(given) and expected is not None and hmac.compare_digest(given.encode(), expected.encode())


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
