"""`headwater flush`: empty a running server's KV cache from the shell, and watch what blocks it."""

import sys
import time
from typing import Any

import click

from headwater.cli.command_line import Target, command, model_options
from headwater.cli.control_client import ANSWER_GRACE_S, ControlError, fail, refused, unreachable
from headwater.cli.server_call import BackgroundCall, HttpAnswer, Server, ServerError

EXIT_INTERRUPTED = 130
POLL_S = 0.25
VIEW_AFTER_S = 0.3  # faster answers need no view

Parameters = dict[str, Any]


@command()
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Seconds to wait for the result."
)
@click.option(
    "--mode",
    type=click.Choice(["idle", "now", "drain"]),
    default="idle",
    show_default=True,
    help="idle: at the first idle moment. now: immediately, under load. drain: immediately, then wait until all old "
    "pages are freed.",
)
@click.option("--tiers", metavar="TIERS", help="Any of device,host,storage, separated by commas. Default: device,host.")
@click.option("--cache-salt", help="Only KV that was cached with this cache_salt.")
@click.option("--extra-key", help="Only KV that was cached with this extra_key.")
@click.option("--lora-path", metavar="NAME", help="Only KV that this LoRA adapter computed; empty: the model alone.")
@click.option("--prefix", help="Only prompts that begin with this text.")
@click.option("--hold", is_flag=True, help="With --mode idle: let new requests queue until the flush is done.")
@click.option("--dry-run", is_flag=True, help="Report what a flush would free and what blocks it; change nothing.")
@click.option("--json", is_flag=True, help="Print the server's answer as JSON.")
@model_options
def flush(json: bool, target: Target, **parameters: Any) -> None:
    """Flush the KV cache of a running server.

    While the command waits, it shows what blocks the flush; Ctrl-C cancels the flush. The exit code is 0 when the cache
    was flushed and 2 when an option is wrong. It is 1 when nothing was flushed, and when requests still hold old pages
    at the deadline of --mode drain.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    try:
        server = Server(target.url, key=target.admin_key, model=target.model)
        answer = _flush(server, given, wants_json=json)
        if answer.status_code >= 300 and "error" in answer.text[:10]:
            raise refused(answer)
    except (ControlError, ServerError) as error:
        raise fail(error if isinstance(error, ControlError) else unreachable(error)) from None
    except KeyboardInterrupt:
        click.secho("Cancelled. Engines that had already flushed stay flushed.", err=True)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
    click.echo(answer.text.rstrip())
    if advice := _advice(answer.status_code, given):
        click.echo(advice, err=True)
        raise click.exceptions.Exit(1)


def _advice(status: int, given: Parameters) -> str:
    """A hint for the next step; empty after a success."""
    if status == 202 and given["mode"] == "drain":
        return (
            "Past the deadline. Old KV can no longer be matched. Requests that hold old pages free them when they "
            "end; a store that has not acknowledged is neither read nor written until it does. A longer --timeout "
            "waits for both."
        )
    if status < 300:
        return ""
    if given["timeout"] > 0:
        return (
            "Nothing was flushed. Next: --hold lets new requests queue meanwhile, a longer --timeout waits longer, "
            "--mode now flushes under load without affecting requests."
        )
    return "Nothing was flushed. Next: --timeout 30 waits for an idle moment, --mode now flushes under load."


def _flush(server: Server, given: Parameters, *, wants_json: bool) -> HttpAnswer:
    """Send the flush; until the answer, show what blocks it. Ctrl-C closes the connection, which cancels the flush."""
    accept = "application/json" if wants_json else "text/plain"
    timeout_s = given["timeout"] + ANSWER_GRACE_S
    asked = {
        name: value for name, value in given.items() if (name, value) != ("timeout", 0.0)
    }  # without --timeout the server lets a busy engine finish its step
    call = BackgroundCall(lambda: server.request("POST", "/flush_cache", asked, timeout_s=timeout_s, accept=accept))
    if not call.is_done(VIEW_AFTER_S) and sys.stderr.isatty():
        _watch(call, server, given)
    return call.result()


def _watch(call: BackgroundCall, server: Server, given: Parameters) -> None:
    # imported here: most flushes are answered before this import would finish
    from rich.console import Console
    from rich.live import Live

    from headwater.cli.flush_view import flush_view

    started_s = time.monotonic() - VIEW_AFTER_S
    blockers: dict[str, Any] | None = None
    with Live(console=Console(stderr=True), transient=True, refresh_per_second=1 / POLL_S) as live:
        while not call.is_done(POLL_S):
            blockers = _blockers(server)
            waited_s = time.monotonic() - started_s
            live.update(flush_view(blockers, mode=given["mode"], waited_s=waited_s, timeout_s=given["timeout"]))


def _blockers(server: Server) -> dict[str, Any] | None:
    """The present blockers; None if the server does not answer: the view must not fail the flush."""
    try:
        answer = server.request("GET", "/control/blockers", timeout_s=2.0)
        return answer.json() if answer.status_code == 200 else None
    except (ServerError, ValueError):
        return None
