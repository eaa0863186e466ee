"""`headwater doctor`: one screen about this machine and this installation, for newcomers and bug reports."""

import json

import click

from headwater.cli.command_line import command
from headwater.server.address import DEFAULT_PORT

_COLORS = {"ok": "green", "note": "yellow", "problem": "red"}


@command()
@click.option("--model", help="Model whose speed is estimated: a name, folder or .gguf file. Default: SmolLM2-135M.")
@click.option("--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="Port to try.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON, with the measured numbers.")
def doctor(model: str | None, port: int, is_json: bool) -> None:
    """Examine this machine and this installation.

    Shows processor, threads, kernels, memory, measured speed, GPU, the default model, disk and port. Each finding is
    ok, a note or a problem, with a remedy. Exits with 1 if there is a problem. Fetches and compiles nothing.
    """
    from headwater.doctor.report import examine

    report = examine(model_name=model, port=port)
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
