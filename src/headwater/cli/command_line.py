"""Shared by all commands: their declaration, help in sections, and the options that name a server."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from headwater.launch.flags import FlagSpec, flag_name
from headwater.server.address import DEFAULT_URL

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class SectionedOption(click.Option):
    """An option that the help shows in a named section."""

    def __init__(self, *args: Any, section: str = "Options", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section


class SectionedCommand(click.Command):
    """Shows its options by section, in the order of their declaration."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_sections(self, ctx, formatter)


class SectionedGroup(click.Group):
    """A command with options of its own, in sections, and subcommands."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_sections(self, ctx, formatter)
        self.format_commands(ctx, formatter)


def write_sections(of: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """The options of a command by section."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in of.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
    for title, records in sections.items():
        with formatter.section(title):
            formatter.write_dl(records)


def command(name: str | None = None) -> Callable[[Callable[..., None]], click.Command]:
    """`click.command` with our settings."""
    return click.command(name, cls=SectionedCommand, context_settings=SETTINGS)


def group(name: str, help: str) -> click.Group:
    """A command that has subcommands."""
    return click.Group(name, help=help, context_settings=SETTINGS, no_args_is_help=True)


def url_option(function: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--url",
        default=DEFAULT_URL,
        envvar="HEADWATER_URL",
        show_default=True,
        show_envvar=True,
        help="Address of the server.",
    )(function)


@dataclass(frozen=True, slots=True)
class Target:
    """The server that a command is about, and the model of it if it is a fleet with several."""

    url: str
    admin_key: str | None = None
    model: str | None = None


def server_options(function: Callable[..., None]) -> Callable[..., None]:
    """--url and --admin-key; the function gets them as `target`."""
    key = click.option(
        "--admin-key",
        envvar="HEADWATER_ADMIN_API_KEY",
        show_envvar=True,
        help="The server's --admin-api-key, or its --api-key if it has no admin key.",
    )

    @wraps(function)
    def call(url: str, admin_key: str | None, model: str | None = None, **others: Any) -> None:
        function(target=Target(url, admin_key, model), **others)

    return url_option(key(call))


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """--url, --admin-key and --model, which names one of a fleet's models."""
    model = click.option(
        "--model", metavar="NAME", help="Of a fleet with several models: the one to act on."
    )
    return model(server_options(function))


def timeout_option(default_s: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--timeout",
        type=click.FloatRange(min=0),
        default=default_s,
        show_default=True,
        help="Maximum seconds to wait.",
    )


def flag_option(name: str, spec: FlagSpec) -> SectionedOption:
    """The option of a struct's field."""
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


def option_type(kind: Any) -> Any:
    """The click type of a field's type."""
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    return click.Path(path_type=Path) if kind is Path else kind
