"""`headwater flush`: empty a running server's KV cache from the shell, watching what is in the way."""

import asyncio
import contextlib
import time
from typing import Annotated, Any, Literal

import httpx
import typer
from rich.console import Console
from rich.live import Live

from headwater.launch.chat import DEFAULT_URL
from headwater.launch.control_client import AdminKey, ControlError, Url, fail, headers, limits, refused, unreachable
from headwater.launch.flush_view import flush_view

EXIT_INTERRUPTED = 130
POLL_S = 0.25
VIEW_AFTER_S = 0.3  # what is answered sooner needs no view

Parameters = dict[str, Any]


def flush(
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the outcome.", min=0.0)] = 0.0,
    mode: Annotated[
        Literal["idle", "now", "drain"],
        typer.Option(
            help="idle: at the first idle moment. now: at once, under load. drain: at once, and wait for all pages."
        ),
    ] = "idle",
    tiers: Annotated[
        str | None, typer.Option(help="Any of device,host,storage. Default: device,host.", metavar="TIERS")
    ] = None,
    cache_salt: Annotated[str | None, typer.Option(help="Only what was cached with this cache_salt.")] = None,
    extra_key: Annotated[str | None, typer.Option(help="Only what was cached with this extra_key.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Only prompts that begin with this text.")] = None,
    hold: Annotated[
        bool, typer.Option("--hold", help="With idle: let no new request start meanwhile (they queue).")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be freed and what blocks; change nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")] = False,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Flush the KV cache of a running server.

    Shows what blocks while it waits; Ctrl-C cancels the flush. Exits with 0 when flushed, 1 when not, 2 when an
    option is wrong.
    """
    scope = {"tiers": tiers, "cache_salt": cache_salt, "extra_key": extra_key, "prefix": prefix}
    parameters = {"timeout": timeout, "mode": mode, "hold": hold, "dry_run": dry_run} | scope
    given = {name: value for name, value in parameters.items() if value is not None}
    try:
        answer = asyncio.run(_flush(given, url=url, admin_key=admin_key, wants_json=json))
        if answer.status_code >= 300 and "error" in answer.text[:10]:
            raise refused(answer)
    except (ControlError, httpx.TransportError, httpx.InvalidURL) as error:
        raise fail(error if isinstance(error, ControlError) else unreachable(error, url)) from None
    except KeyboardInterrupt:
        typer.secho("Cancelled. What had been flushed before stays flushed.", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    typer.echo(answer.text.rstrip())
    if answer.status_code >= 300:
        raise typer.Exit(1)


async def _flush(given: Parameters, *, url: str, admin_key: str | None, wants_json: bool) -> httpx.Response:
    """Ask for the flush and show what blocks until it is answered. Cancelling it leaves, which the server sees."""
    accept = {"Accept": "application/json" if wants_json else "text/plain"}
    async with httpx.AsyncClient(
        base_url=url.rstrip("/"),
        headers=headers(admin_key),
        timeout=limits(given["timeout"]),
        trust_env=False,
    ) as http:
        call = asyncio.ensure_future(http.post("/flush_cache", json=given, headers=accept))
        try:
            await asyncio.wait({call}, timeout=VIEW_AFTER_S)
            console = Console(stderr=True)
            if not call.done() and console.is_terminal:
                await _watch(call, http, given, console)
            return await call
        finally:
            call.cancel()


async def _watch(
    call: "asyncio.Future[httpx.Response]", http: httpx.AsyncClient, given: Parameters, console: Console
) -> None:
    started_s = time.monotonic() - VIEW_AFTER_S
    blockers: dict[str, Any] | None = None
    with Live(console=console, transient=True, refresh_per_second=1 / POLL_S) as live:
        while not call.done():
            with contextlib.suppress(httpx.HTTPError, ValueError):  # the view is not worth a failure
                answer = await http.get("/control/blockers", timeout=2.0)
                blockers = answer.json() if answer.status_code == 200 else None
            waited_s = time.monotonic() - started_s
            live.update(flush_view(blockers, mode=given["mode"], waited_s=waited_s, timeout_s=given["timeout"]))
            await asyncio.wait({call}, timeout=POLL_S)
