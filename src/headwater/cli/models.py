"""`headwater models`: the models that Headwater fetches by name, and where their files are."""

import click

from headwater.cli.command_line import group
from headwater.launch.default_model import (
    DEFAULT_MODEL_NAME,
    PACKAGED_MODELS,
    PackagedModel,
    ensure_model,
    has_its_size,
    is_present,
    model_path,
)

models = group("models", "List and fetch the models known by name, and print their paths.")

_ROW = "{:<24} {:>8}  {:<12} {:<8} {}"


@models.command("list")
def list_models() -> None:
    """List the models: size, licence, whether the file is present, and its path.

    The list compares only the size of the file; `headwater models path` and `pull` check its content.
    """
    click.echo(_ROW.format("NAME", "SIZE", "LICENCE", "PRESENT", "PATH"))
    for model in PACKAGED_MODELS.values():
        size = f"{model.file_bytes / 1e6:.0f} MB"
        present = "yes" if has_its_size(model) else "no"
        click.echo(_ROW.format(model.name, size, model.license, present, str(model_path(model))))


@models.command()
@click.argument("name", default=DEFAULT_MODEL_NAME)
def pull(name: str) -> None:
    """Fetch a model into the cache unless it is there, and print its path."""
    model = _find(name)
    try:
        path = ensure_model(model)
    except (OSError, ValueError) as error:
        click.secho(str(error), err=True, fg="red")
        raise click.exceptions.Exit(1) from None
    click.echo(path)


@models.command()
@click.argument("name", default=DEFAULT_MODEL_NAME)
def path(name: str) -> None:
    """Print the path of a model's file. Without a fetched file, print nothing and exit with 1."""
    model = _find(name)
    if not is_present(model):
        click.secho(f"{name} is not in the cache; fetch it with `headwater models pull {name}`", err=True)
        raise click.exceptions.Exit(1)
    click.echo(model_path(model))


def _find(name: str) -> PackagedModel:
    if name not in PACKAGED_MODELS:
        known = ", ".join(PACKAGED_MODELS)
        raise click.BadParameter(f"{name!r} is not one of: {known}", param_hint="NAME")
    return PACKAGED_MODELS[name]
