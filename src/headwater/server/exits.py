"""Exit codes of `headwater serve`, and its error message before it ends."""

import os

import click

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130


def print_error(message: str) -> None:
    color = False if os.environ.get("NO_COLOR") else None  # None: as the terminal is
    click.echo(f"{click.style('error:', fg='red')} {message}", err=True, color=color)
