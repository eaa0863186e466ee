"""Calls of a running server's control routes from the shell commands, with errors as sentences."""

import click

from headwater.cli.command_line import Target
from headwater.cli.server_call import HttpAnswer, Json, MalformedUrl, Server, ServerError
from headwater.messages.blocker_words import blockers_in_words

EXIT_FAILED = 1
EXIT_USAGE = 2
ANSWER_GRACE_S = 35.0  # beyond the timeout sent to the server, which gives busy engines 30 s


class ControlError(Exception):
    """The server could not be reached, or refused. The message is for the user, `exit_code` for the shell."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def ask(method: str, path: str, *, target: Target, body: Json | None = None, timeout_s: float = 0.0) -> Json:
    """The JSON answer of a control route; `timeout_s` is the time that the server may take. Raises ControlError."""
    try:
        server = Server(target.url, key=target.admin_key, model=target.model)
        answer = server.request(method, path, body, timeout_s=timeout_s + ANSWER_GRACE_S)
    except ServerError as error:
        raise unreachable(error) from None
    if answer.status_code >= 300:
        raise refused(answer)
    try:
        return answer.json()
    except ValueError:
        raise ControlError(f"{target.url} answers, but not like a Headwater server.") from None


def unreachable(error: ServerError) -> ControlError:
    return ControlError(str(error), EXIT_USAGE if isinstance(error, MalformedUrl) else EXIT_FAILED)


def refused(answer: HttpAnswer) -> ControlError:
    """The error for a refusal by the server. If the answer names a parameter, the user made the mistake."""
    message = answer.refusal()
    if answer.status_code in (401, 403):
        message += "\nGive the key with --admin-key or in HEADWATER_ADMIN_API_KEY."
    if blockers := answer.error.get("blockers"):
        message += f"\nNot idle: {blockers_in_words(blockers)}. A longer --timeout waits for it."
    is_usage = answer.status_code == 400 and answer.error.get("param") is not None
    return ControlError(message, EXIT_USAGE if is_usage else EXIT_FAILED)


def fail(error: ControlError) -> click.exceptions.Exit:
    """Print the error; the caller raises the returned exception."""
    click.secho(str(error), err=True, fg="red")
    return click.exceptions.Exit(error.exit_code)
