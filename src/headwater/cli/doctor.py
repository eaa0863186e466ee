"""`headwater doctor`: one screen about this machine and this installation, for newcomers and bug reports."""

import json
from typing import get_args

import click

from headwater.cli.command_line import command
from headwater.messages.choices import StoreKind
from headwater.server.address import DEFAULT_PORT

_COLORS = {"ok": "green", "note": "yellow", "problem": "red"}


@command()
@click.option("--model", help="Model whose speed is estimated: a name, folder or .gguf file. Default: SmolLM2-135M.")
@click.option("--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="Port to try.")
@click.option("--hicache-storage-backend", type=click.Choice(get_args(StoreKind)), help="Try this store with a page.")
@click.option("--hicache-storage-dir", help="Folder of the file store.")
@click.option("--hicache-storage-url", envvar="HEADWATER_STORAGE_URL", help="Address of the Redis or Valkey store.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON, with the measured numbers.")
def doctor(
    model: str | None,
    port: int,
    hicache_storage_backend: str | None,
    hicache_storage_dir: str | None,
    hicache_storage_url: str | None,
    is_json: bool,
) -> None:
    """Examine this machine and this installation.

    Shows processor, threads, kernels, memory, measured speed, GPU, PyTorch, the model, disk, port, and a store if you
    name one. Each finding is ok, a note or a problem, with a remedy. Exits with 1 if there is a problem. Fetches and
    compiles nothing.
    """
    from headwater.doctor.report import StoreChoice, examine

    storage = None
    if hicache_storage_backend is not None:
        url = hicache_storage_url if hicache_storage_backend == "redis" else None  # it may come from the environment
        storage = StoreChoice(hicache_storage_backend, hicache_storage_dir, url)
    report = examine(model_name=model, port=port, storage=storage)
    if is_json:
        click.echo(json.dumps(report.as_json(), indent=1))
    else:
        for finding in report.findings:
            level = click.style(f"{finding.level.value:8}", fg=_COLORS[finding.level.value])
            click.echo(f"{level} {finding.subject:10} {finding.text}")
            if finding.remedy:
                click.echo(f"{'':20}-> {finding.remedy}")
    if report.has_problems:
        raise click.exceptions.Exit(1)
