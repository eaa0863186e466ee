"""The `headwater` command: a table of subcommands, each imported only when it is called."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click

from headwater.cli.command_line import SETTINGS


@dataclass(frozen=True, slots=True)
class Entry:
    """The location of a command, as `module:name`, and its line in the list."""

    target: str
    summary: str

    def load(self) -> click.Command:
        module, _, name = self.target.partition(":")
        return getattr(import_module(f"headwater.cli.{module}"), name)


COMMANDS = {
    "serve": Entry("serve:serve", "Serve a model over OpenAI's and SGLang's HTTP APIs."),
    "fleet": Entry("fleet:fleet", "Serve with several replicas as one server, on Ray."),
    "chat": Entry("chat:chat", "Chat with a running server."),
    "top": Entry("top.command:top", "Watch and operate a running server from a terminal."),
    "flush": Entry("flush:flush", "Flush the KV cache of a running server."),
    "pause": Entry("control:pause", "Pause generation; requests that arrive during the pause wait."),
    "continue": Entry("control:resume", "End a pause."),
    "weights": Entry("control:weights", "Update, label and inspect the weights of a running server."),
    "memory": Entry("control:memory", "Release the memory of a running server, and resume it."),
    "models": Entry("models:models", "List and fetch the models known by name, and print their paths."),
    "doctor": Entry("doctor:doctor", "Examine this machine and this installation."),
    "bench": Entry("bench.command:bench", "Put load on a running server, and report what its clients see."),
    "simulate": Entry("simulate:simulate", "Run the real engine through random load, operations and faults."),
    "version": Entry("serve:version", "Print the version of Headwater."),
}


class CommandTable(click.Group):
    """Lists `COMMANDS` without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command's name and summary, for lists."""
        return click.Command(cmd_name, help=COMMANDS[cmd_name].summary) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, COMMANDS[name].load() if name and listed else None, rest


@click.command(cls=CommandTable, context_settings=SETTINGS, no_args_is_help=True)
def app() -> None:
    """An LLM inference server whose KV cache can be operated while it serves."""


def main() -> None:
    app()
