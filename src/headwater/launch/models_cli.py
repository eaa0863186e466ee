"""`headwater models`: the models Headwater can fetch by itself, and where they are."""

from typing import Annotated

import typer

from headwater.launch.default_model import (
    DEFAULT_MODEL_NAME,
    PACKAGED_MODELS,
    PackagedModel,
    ensure_model,
    is_present,
    model_path,
)

models_app = typer.Typer(help="List, fetch and find the models known by name.", no_args_is_help=True)

_ROW = "{:<24} {:>8}  {:<12} {:<8} {}"

ModelName = Annotated[str, typer.Argument(help="Name of the model, as `headwater models list` shows it.")]


@models_app.command(name="list")
def list_models() -> None:
    """List the models: size, licence, where the file is or would be, and whether it is there."""
    typer.echo(_ROW.format("NAME", "SIZE", "LICENCE", "PRESENT", "PATH"))
    for model in PACKAGED_MODELS.values():
        size = f"{model.file_bytes / 1e6:.0f} MB"
        present = "yes" if is_present(model) else "no"
        typer.echo(_ROW.format(model.name, size, model.license, present, str(model_path(model))))


@models_app.command()
def pull(name: ModelName = DEFAULT_MODEL_NAME) -> None:
    """Fetch a model into the cache, if it is not there, and print its path."""
    model = _find(name)
    try:
        path = ensure_model(model)
    except (OSError, ValueError) as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(1) from None
    typer.echo(path)


@models_app.command()
def path(name: ModelName = DEFAULT_MODEL_NAME) -> None:
    """Print where a model's file is. Exits with 1, printing nothing, if it has not been fetched."""
    model = _find(name)
    if not is_present(model):
        typer.secho(f"{name} is not in the cache; fetch it with `headwater models pull {name}`", err=True)
        raise typer.Exit(1)
    typer.echo(model_path(model))


def _find(name: str) -> PackagedModel:
    if name not in PACKAGED_MODELS:
        known = ", ".join(PACKAGED_MODELS)
        raise typer.BadParameter(f"{name!r} is not one of: {known}", param_hint="NAME")
    return PACKAGED_MODELS[name]
