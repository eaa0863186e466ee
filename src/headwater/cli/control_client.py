"""How the shell commands use a running server's control routes: options, keys, and errors as sentences."""

from typing import Any

import click

from headwater.cli.server_call import Answer, MalformedUrl, Server, ServerError
from headwater.http_api.control.blocker_words import blockers_in_words

EXIT_FAILED = 1
EXIT_USAGE = 2
ANSWER_GRACE_S = 35.0  # beyond what the server was told it may take; it gives busy engines 30 s

Json = dict[str, Any]


class ControlError(Exception):
    """The server could not be asked, or refused. The message is for the user, `exit_code` for the shell."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def ask(
    method: str, path: str, *, url: str, admin_key: str | None, body: Json | None = None, timeout_s: float = 0.0
) -> Json:
    """The JSON of a control route's answer; `timeout_s` is what the server may take. Raises ControlError."""
    try:
        answer = Server(url, key=admin_key).request(method, path, body, timeout_s=timeout_s + ANSWER_GRACE_S)
    except ServerError as error:
        raise unreachable(error) from None
    if answer.status_code >= 300:
        raise refused(answer)
    try:
        return answer.json()
    except ValueError:
        raise ControlError(f"{url} answers, but not like a Headwater server.") from None


def unreachable(error: ServerError) -> ControlError:
    return ControlError(str(error), EXIT_USAGE if isinstance(error, MalformedUrl) else EXIT_FAILED)


def refused(answer: Answer) -> ControlError:
    """Why the server said no. A parameter it names is the user's mistake."""
    message = answer.refusal()
    if answer.status_code in (401, 403):
        message += "\nGive the key with --admin-key or in HEADWATER_ADMIN_API_KEY."
    if blockers := answer.error.get("blockers"):
        message += f"\nNot idle: {blockers_in_words(blockers)}. A longer --timeout waits for it."
    is_usage = answer.status_code == 400 and answer.error.get("param") is not None
    return ControlError(message, EXIT_USAGE if is_usage else EXIT_FAILED)


def fail(error: ControlError) -> click.exceptions.Exit:
    """Print the error; raise what is returned."""
    click.secho(str(error), err=True, fg="red")
    return click.exceptions.Exit(error.exit_code)
