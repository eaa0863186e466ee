"""`headwater top`: a running server at a glance, in a terminal."""

import sys

import click

from headwater.cli.command_line import Target, command, model_options

NEEDS_TEXTUAL = "headwater top needs textual: pip install 'headwater[top]' (in a clone: EXTRAS=top make setup)"


@command()
@model_options
def top(target: Target) -> None:
    """Watch and operate a running server from a terminal.

    One screen, refreshed every second: tiers by owner, hit rate, latencies, requests, pending operations, events. Keys
    flush (after a dry run), pause, and cancel operations; ? lists them. It needs 80 x 24 characters and no colour, so
    it works over ssh and in tmux.
    """
    # imported here: the library takes a third of a second, and other answers of this command must not wait for it
    try:
        import textual  # noqa: F401
    except ImportError:
        raise click.ClickException(NEEDS_TEXTUAL) from None
    from headwater.cli.server_call import MalformedUrl, Server
    from headwater.cli.top.app import TopApp

    try:
        server = Server(target.url, key=target.admin_key, model=target.model)
    except MalformedUrl as error:
        raise click.BadParameter(str(error)) from None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.ClickException("headwater top needs a terminal; `curl URL/dashboard/snapshot` is for programs")
    TopApp(server).run()
