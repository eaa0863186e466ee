"""`headwater pause | continue | weights | memory`: operate a running server from the shell."""

from pathlib import Path
from typing import Any

import click

from headwater.cli.command_line import Target, command, group, model_options, timeout_option
from headwater.cli.control_client import ControlError, ask, fail

MIB = 1 << 20
DONE = {"abort": "aborted", "retract": "put back into the queue", "in_place": "frozen"}

weights = group("weights", "Update, label and inspect the weights of a running server.")
memory = group("memory", "Release the memory of a running server, and resume it.")


@command()
@click.option(
    "--mode",
    type=click.Choice(list(DONE)),
    default="retract",
    show_default=True,
    help="What happens to running requests. retract: they return to the queue without KV and go on after `headwater "
    "continue`. in_place: they are frozen with their KV. abort: they are ended (the default of SGLang's route).",
)
@model_options
def pause(mode: str, target: Target) -> None:
    """Pause generation; requests that arrive during the pause wait.

    No request is lost, except with --mode abort. `headwater continue` ends the pause.
    """
    answer = _ask("POST", "/pause_generation", {"mode": mode}, target)
    click.echo(f"Paused. Running requests {DONE[mode]}: {answer['num_requests']}.")


@command("continue")
@model_options
def resume(target: Target) -> None:
    """End a pause."""
    _ask("POST", "/continue_generation", {}, target)
    click.echo("Continued.")


@weights.command()
@click.argument("path")
@click.option("--version", "weight_version", help="New label for the weights. Default: keep the label.")
@click.option("--abort", is_flag=True, help="End running requests first.")
@click.option(
    "--load-format",
    type=click.Choice(["auto", "safetensors", "gguf"]),
    default="auto",
    show_default=True,
    help="Format of the files.",
)
@timeout_option(600.0)
@model_options
def update(
    path: str,
    weight_version: str | None,
    abort: bool,
    load_format: str,
    timeout: float,
    target: Target,
) -> None:
    """Load new weights while the server serves, all or nothing. No prompt matches KV of the old weights afterwards.

    PATH is a .gguf file, or a folder with safetensors files of some or all tensors.
    """
    local = Path(path).expanduser()
    body = {
        "model_path": str(local.resolve()) if local.exists() else path,
        "weight_version": weight_version,
        "abort_all_requests": abort,
        "load_format": load_format,
        "timeout": timeout,
    }
    answer = _ask("POST", "/update_weights_from_disk", body, target, timeout_s=timeout)
    click.echo(
        f"{answer['message']} {answer['num_tensors']} tensors, version {answer['weight_version']!r}, "
        f"weights_id {answer['weights_id']}. Requests carried over: {answer['num_kept']}, "
        f"aborted: {answer['num_aborted']}."
    )


@weights.command()
@click.argument("new_version", required=False)
@click.option("--keep-running", is_flag=True, help="Do not abort running requests (during a pause none are aborted).")
@model_options
def version(new_version: str | None, keep_running: bool, target: Target) -> None:
    """Print or change the label of the weights; the cache stays as it is.

    Without NEW_VERSION: print the label.
    """
    if new_version is None:
        click.echo(_ask("GET", "/get_weight_version", None, target)["weight_version"])
        return
    body = {"new_version": new_version} | ({"abort_all_requests": False} if keep_running else {})
    click.echo(_ask("POST", "/update_weight_version", body, target)["message"])


@weights.command()
@click.argument("name")
@click.option(
    "--num-values",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Number of values to print, from the first on.",
)
@model_options
def get(name: str, num_values: int, target: Target) -> None:
    """Print the first values of a parameter, for each engine.

    NAME is the parameter's name in Hugging Face's layout, for example model.norm.weight.
    """
    body = {"name": name, "truncate_size": num_values}
    answer = _ask("POST", "/get_weights_by_name", body, target)
    click.echo(f"{answer['name']}  {answer['dtype']}  {'x'.join(map(str, answer['shape']))}")
    for engine in answer["engines"]:
        label = f"engine {engine['dp_rank']}: " if len(answer["engines"]) > 1 else ""
        click.echo(label + " ".join(f"{value:g}" for value in engine["values"]))


@memory.command()
@click.argument("tags", nargs=-1)
@timeout_option(0.0)
@model_options
def release(tags: tuple[str, ...], timeout: float, target: Target) -> None:
    """Release memory when the engine is idle; requests queue until `headwater memory resume`.

    TAGS are kv_cache, weights, or both. Default: all.
    """
    body = {"tags": list(tags), "timeout": timeout}
    answer = _ask("POST", "/release_memory_occupation", body, target, timeout_s=timeout)
    click.echo(f"Released {answer['num_bytes'] / MIB:,.0f} MiB. Released now: {', '.join(answer['released'])}.")


@memory.command("resume")
@click.argument("tags", nargs=-1)
@timeout_option(600.0)
@model_options
def resume_memory(tags: tuple[str, ...], timeout: float, target: Target) -> None:
    """Allocate released memory again and run the queued requests.

    TAGS are kv_cache, weights, or both. Default: all.
    """
    body = {"tags": list(tags), "timeout": timeout}
    answer = _ask("POST", "/resume_memory_occupation", body, target, timeout_s=timeout)
    click.echo(f"Resumed. Still released: {', '.join(answer['released']) or 'nothing'}.")


def _ask(
    method: str, path: str, body: dict[str, Any] | None, target: Target, *, timeout_s: float = 0.0
) -> dict[str, Any]:
    try:
        return ask(method, path, target=target, body=body, timeout_s=timeout_s)
    except ControlError as error:
        raise fail(error) from None
