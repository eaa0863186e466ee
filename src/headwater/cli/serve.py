"""`headwater serve`, with one option for each field of `ServerArgs`, and `headwater version`."""

import sys
from typing import Any

import click

from headwater.cli.command_line import SETTINGS, SectionedCommand, command, flag_option
from headwater.heap import map_large_buffers, pause_collection
from headwater.launch.config import FLAGS, ServerArgs


def _serve(**options: Any) -> None:
    """Serve a model over OpenAI's and SGLang's HTTP APIs.

    Without --model, the server fetches the default model once and serves it. Ctrl-C ends the server.
    """
    map_large_buffers()
    pause_collection()
    try:
        args = ServerArgs(**options)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    from headwater.server.serve import serve

    sys.exit(serve(args))


serve = SectionedCommand(
    "serve",
    callback=_serve,
    help=_serve.__doc__,
    params=[flag_option(name, spec) for name, spec in FLAGS.items()],
    context_settings=SETTINGS,
)


@command()
def version() -> None:
    """Print the version of Headwater."""
    from headwater.version import version

    print(f"headwater {version()}")
