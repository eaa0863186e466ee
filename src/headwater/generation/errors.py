"""Errors of all APIs, as `{"error": {message, type, param, code}}`. No web framework: the Python API has the same."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from headwater.client.errors import (
    CallFailed,
    EngineGone,
    EngineLoading,
    EngineOut,
    NoSuchEngine,
    NotTheSame,
    RidInUse,
    ShuttingDown,
)
from headwater.messages.generation import Finish

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "method_not_allowed",
    408: "timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_error",
    431: "request_too_large",
    501: "not_implemented",
    503: "service_unavailable",
    504: "timeout",
}

MAX_MESSAGE_CHARS = 1000


class ApiError(Exception):
    """An error answer. `param` is the invalid parameter, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | int | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = status if code is None else code
        self.type = type or TYPES.get(status, "internal_server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})
        if status in (429, 503):
            self.headers.setdefault("Retry-After", "1")
        self.details = dict(details or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the answer; also the event that ends a stream in an error."""
        param = None if self.param is None else _shown(self.param)
        error = {"message": _shown(self.message), "type": self.type, "param": param, "code": self.code}
        return {"error": error | self.details}

    def event(self) -> dict[str, Any]:
        """The same inside a stream, where the client sees no status: `retryable` stands for it."""
        body = self.body()
        body["error"]["retryable"] = self.status in (429, 503)
        return body


def _shown(text: str) -> str:
    """A message may quote what the client sent: it is cut, and always valid Unicode."""
    if len(text) > MAX_MESSAGE_CHARS:
        half = MAX_MESSAGE_CHARS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


class ClientLeft(Exception):
    """The client disconnected before its answer was ready."""


class InvalidRequest(ApiError, ValueError):
    """A 400 that names the parameter; a `ValueError` for callers without HTTP."""


def bad_request(param: str, message: str, *, code: str = "invalid_value") -> InvalidRequest:
    """A 400; `message` names the parameter and what it accepts."""
    return InvalidRequest(400, message, param=param, code=code)


def unsupported(param: str, message: str) -> InvalidRequest:
    """A 400 for a feature that this server lacks; `message` names the parameter."""
    return bad_request(param, message, code="unsupported_value")


def from_value_error(error: ValueError) -> InvalidRequest:
    """The 400 for a `ValueError` whose text begins with the parameter, as those of `tokenization` do."""
    param = str(error).partition(":")[0]
    return bad_request(param, str(error))


def loading() -> ApiError:
    return ApiError(503, "the model is still loading", code="loading")


def adapter_not_found(name: str) -> ApiError:
    """No LoRA adapter is loaded under this name."""
    message = f"lora_path: no adapter {name!r} is loaded"
    return ApiError(404, message, param="lora_path", code="model_not_found", type="invalid_request_error")


def model_not_found(name: str, *served_names: str) -> ApiError:
    served = ", ".join(repr(each) for each in served_names)
    message = f"The model {name!r} does not exist; this server serves {served}."
    return ApiError(404, message, param="model", code="model_not_found", type="invalid_request_error")


def from_finish(finish: Finish) -> ApiError | None:
    """The error of a request that the engine refused or aborted with an error; None for an ordinary end."""
    if finish.type != "abort" or finish.status < 400:
        return None
    headers: dict[str, str] = {}
    if finish.retry_after_s:
        headers["Retry-After"] = str(finish.retry_after_s)
    if finish.status == 504:
        headers["x-should-retry"] = "false"  # SDKs that Stainless makes would repeat it, for as long again
    return ApiError(
        finish.status,
        finish.message or "the request was aborted",
        code=finish.code or None,
        type=finish.err_type or None,
        headers=headers,
    )


def aborted(finish: Finish) -> ApiError:
    """For clients of OpenAI's API: their request was aborted. 499, because SDKs do not retry it."""
    message = f"the request was ended before its answer was whole: {finish.message or 'aborted'}"
    return ApiError(499, message, code="aborted", type="aborted")


def as_api_error(error: BaseException) -> ApiError | None:
    """The answer for an exception of the layers below; None for a bug."""
    match error:
        case ApiError():
            return error
        case ShuttingDown():
            return ApiError(503, error.reason, code="shutting_down")
        case EngineGone():
            details = {"engine": error.engine, "since": error.since}
            return ApiError(503, f"{error} (since {error.since})", code="engine_gone", details=details)
        case EngineOut():
            return ApiError(503, str(error), code="engine_out", details={"engine": error.engine})
        case NotTheSame():
            return ApiError(409, str(error), code="not_the_same", details={"engine": error.engine})
        case EngineLoading():
            return ApiError(503, str(error), code="loading", details={"engine": error.engine})
        case CallFailed():
            failed = error.failed
            details = {"blockers": failed.blockers} if failed.blockers else None
            code = "invalid_value" if failed.status == 400 and failed.param else None
            return ApiError(failed.status, failed.message, param=failed.param, code=code, details=details)
        case RidInUse():
            return bad_request("rid", str(error), code="rid_in_use")
        case NoSuchEngine():
            return bad_request("routed_dp_rank", str(error))
        case ValidationError():
            return from_validation(error.errors())
        case ClientLeft():
            return ApiError(499, "the client left")
        case TimeoutError():
            return ApiError(504, "the engine did not answer in time; it does nothing of this any more", code="timeout")
    return None


def from_validation(problems: Any) -> ApiError:
    """The 400 for pydantic's list of errors; only the first one is reported."""
    first = problems[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return InvalidRequest(400, f"the body is not valid JSON: {reason} at character {path[-1]}", code="invalid_json")
    if not path and first["type"] in ("missing", "model_attributes_type"):
        return InvalidRequest(
            400,
            "the body must be a JSON object, sent with content-type: application/json",
            code="invalid_body",
        )
    if first["type"] == "request_field":  # a refused name, see `body`
        name, code = first["ctx"]["param"], first["ctx"]["code"]
        param = ".".join(part for part in (_readable_path(path), name) if part)
        return InvalidRequest(400, f"{param}: {first['msg']}", param=param, code=code)
    param = _readable_path(path)
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    text = reason[:1].lower() + reason[1:]
    message = text if param and text.startswith(param) else f"{param or 'the request'}: {text}"
    return InvalidRequest(400, message, param=param or None, code="invalid_value")


def _readable_path(path: list[str]) -> str:
    """`messages[0].content` from pydantic's location; names of union members are left out."""
    readable = ""
    for part in path:
        if part.isdigit():
            readable += f"[{part}]"
        elif part.isidentifier() and not (part in _UNION_MEMBERS or part[0].isupper()):
            readable += f".{part}" if readable else part
    return readable


_UNION_MEMBERS = {"str", "int", "float", "bool", "dict", "list", "tuple"}
