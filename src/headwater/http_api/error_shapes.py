"""The shape of an error answer: OpenAI's on most routes, Anthropic's and Ollama's on theirs.

The path decides, so refusals of the middleware (keys, sizes, foreign pages) have the right shape as well.
"""

from headwater.generation.answer_fields import Json
from headwater.generation.errors import ApiError

ANTHROPIC = "/v1/messages"
OLLAMA = "/api/"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}


def error_body(error: ApiError, path: str) -> Json:
    """The JSON of an error answer to a request for `path`."""
    if path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/"):
        return anthropic_error(error)
    if path.startswith(OLLAMA):
        return ollama_error(error)
    return error.body()


def anthropic_error(error: ApiError) -> Json:
    """Anthropic's shape. `param` and `code` are additions, as on the other routes."""
    default = "api_error" if error.status >= 500 else "invalid_request_error"
    facts = error.body()["error"]
    return {"type": "error", "error": facts | {"type": _ANTHROPIC_TYPES.get(error.status, default)}}


def ollama_error(error: ApiError) -> Json:
    """Ollama's shape: a text."""
    return {"error": error.body()["error"]["message"]}
