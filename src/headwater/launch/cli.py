"""The `headwater` command. Imports of anything heavy happen inside the commands: `--help` is instant."""

import inspect
import sys
from collections.abc import Callable
from importlib.metadata import version as installed_version
from typing import Annotated, Any

import typer

from headwater.launch.chat import chat
from headwater.launch.config import FLAGS, ServerArgs, flag_name
from headwater.launch.control_cli import memory_app, pause, resume, weights_app
from headwater.launch.flush import flush
from headwater.launch.models_cli import models_app
from headwater.launch.simulate_cli import simulate

app = typer.Typer(
    name="headwater",
    help="An LLM inference server whose KV cache can be operated while it serves.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models_app, name="models")
app.command()(chat)
app.command()(flush)
app.command()(pause)
app.command(name="continue")(resume)
app.command()(simulate)
app.add_typer(weights_app, name="weights")
app.add_typer(memory_app, name="memory")


def takes_server_args(command: Callable[[ServerArgs], None]) -> Callable[..., None]:
    """Turn a function of `ServerArgs` into a typer command with one option for each of its fields."""

    def run(**options: Any) -> None:
        try:
            args = ServerArgs(**options)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        command(args)

    parameters = []
    for name, spec in FLAGS.items():
        names = [flag_name(name), *spec.flag.also]
        if spec.type is bool:
            names = [flag_name(name)]  # a switch: no --no-... twin
        option = typer.Option(
            *names,
            help=spec.flag.help,
            rich_help_panel=spec.flag.panel,
            envvar=spec.flag.env,
            show_default=spec.default is not None and spec.default is not False,
        )
        kind = spec.type | None if spec.is_optional else spec.type
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=spec.default, annotation=Annotated[kind, option]
            )
        )
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


@app.command()
@takes_server_args
def serve(args: ServerArgs) -> None:
    """Serve a model over OpenAI's and SGLang's HTTP APIs.

    Without --model the default model is fetched once and served. Ctrl-C ends the server.
    """
    from headwater.launch.serve import serve

    sys.exit(serve(args))


@app.command()
def version() -> None:
    """Print the version of Headwater."""
    print(f"headwater {installed_version('headwater')}")


def main() -> None:
    app()
