"""How the shell commands talk to a running server's control routes: options, keys, and errors as sentences."""

from typing import Annotated, Any

import httpx
import typer

from headwater.launch.chat import DEFAULT_URL, explain_refusal, explain_transport_error

EXIT_FAILED = 1
EXIT_USAGE = 2
CONNECT_TIMEOUT_S = 10.0
ANSWER_GRACE_S = 30.0  # beyond what the server was told it may take

Json = dict[str, Any]
Url = Annotated[str, typer.Option(help="Where the server is.")]
AdminKey = Annotated[
    str | None,
    typer.Option(
        help="The server's --admin-api-key, or its --api-key if it has no other.", envvar="HEADWATER_ADMIN_API_KEY"
    ),
]
Timeout = Annotated[float, typer.Option(help="Seconds to wait, at most.", min=0.0)]


class ControlError(Exception):
    """The server could not be asked, or refused. The message is for the user, `exit_code` for the shell."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def headers(admin_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {admin_key}"} if admin_key else {}


def limits(timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(CONNECT_TIMEOUT_S, read=timeout_s + ANSWER_GRACE_S)


def ask(
    method: str, path: str, *, url: str, admin_key: str | None, body: Json | None = None, timeout_s: float = 0.0
) -> Json:
    """The JSON of a control route's answer; `timeout_s` is what the server may take. Raises ControlError."""
    try:
        answer = httpx.request(
            method,
            url.rstrip("/") + path,
            json=body,
            headers=headers(admin_key),
            timeout=limits(timeout_s),
            trust_env=False,
        )
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise unreachable(error, url) from None
    if answer.status_code >= 300:
        raise refused(answer)
    try:
        return answer.json()
    except ValueError:
        raise ControlError(f"{url} answers, but not like a Headwater server.") from None


def unreachable(error: Exception, url: str) -> ControlError:
    if isinstance(error, httpx.TransportError):
        return ControlError(explain_transport_error(error, url))
    return ControlError(f"{url} is not an address like {DEFAULT_URL}: {error}", EXIT_USAGE)


def refused(answer: httpx.Response) -> ControlError:
    """Why the server said no. A parameter it names is the user's mistake."""
    message = explain_refusal(answer)
    if answer.status_code in (401, 403):
        message += "\nGive the key with --admin-key or in HEADWATER_ADMIN_API_KEY."
    if blockers := _error_of(answer).get("blockers"):
        message += "\nNot idle: " + ", ".join(f"{name}={count}" for name, count in sorted(blockers.items()))
    is_usage = answer.status_code == 400 and _error_of(answer).get("param") is not None
    return ControlError(message, EXIT_USAGE if is_usage else EXIT_FAILED)


def fail(error: ControlError) -> typer.Exit:
    """Print the error; raise what is returned."""
    typer.secho(str(error), err=True, fg="red")
    return typer.Exit(error.exit_code)


def _error_of(answer: httpx.Response) -> Json:
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}
