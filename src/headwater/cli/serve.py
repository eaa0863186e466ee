"""`headwater serve`, with one option for each field of `ServerArgs`, and `headwater version`."""

import sys
from typing import Any

import click

from headwater.cli.command_line import SETTINGS, SectionedCommand, SectionedOption, command, option_type
from headwater.heap import pause_collection
from headwater.launch.config import FLAGS, ServerArgs
from headwater.launch.flags import FlagSpec, flag_name


def flag_option(name: str, spec: FlagSpec) -> SectionedOption:
    is_switch = spec.type is bool  # has no --no-... form
    return SectionedOption(
        [flag_name(name), *spec.flag.also, name],
        section=spec.flag.section,
        help=spec.flag.help,
        type=None if is_switch else option_type(spec.type),
        is_flag=is_switch,
        default=spec.default,
        show_default=spec.default is not None and spec.default is not False,
        envvar=spec.flag.env,
        show_envvar=True,
    )


def _serve(**options: Any) -> None:
    """Serve a model over OpenAI's and SGLang's HTTP APIs.

    Without --model, the server fetches the default model once and serves it. Ctrl-C ends the server.
    """
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
