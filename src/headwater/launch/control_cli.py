"""`headwater pause | continue | weights | memory`: operate a running server from the shell."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headwater.launch.chat import DEFAULT_URL
from headwater.launch.control_client import AdminKey, ControlError, Timeout, Url, ask, fail

MIB = 1 << 20

weights_app = typer.Typer(help="The weights of a running server: update, label, look at.", no_args_is_help=True)
memory_app = typer.Typer(help="Give a running server's memory back, and take it again.", no_args_is_help=True)

Tags = Annotated[
    list[str] | None, typer.Argument(help="kv_cache, weights, or both. Default: all.", show_default=False)
]


def pause(
    mode: Annotated[
        Literal["abort", "retract", "in_place"],
        typer.Option(help="What becomes of running requests: end them, queue them without KV, or freeze them."),
    ] = "abort",
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Pause generation; requests that arrive meanwhile wait."""
    answer = _ask("POST", "/pause_generation", {"mode": mode}, url, admin_key)
    done = {"abort": "aborted", "retract": "put back into the queue", "in_place": "frozen"}[mode]
    typer.echo(f"Paused. Running requests {done}: {answer['num_requests']}.")


def resume(url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """End a pause."""
    _ask("POST", "/continue_generation", {}, url, admin_key)
    typer.echo("Continued.")


@weights_app.command()
def update(
    path: Annotated[str, typer.Argument(help="A safetensors folder (all tensors or some) or a .gguf file.")],
    weight_version: Annotated[
        str | None, typer.Option("--version", help="New label for the weights. Default: it stays.")
    ] = None,
    abort: Annotated[bool, typer.Option("--abort", help="End running requests first.")] = False,
    load_format: Annotated[Literal["auto", "safetensors", "gguf"], typer.Option(help="Format of the files.")] = "auto",
    timeout: Timeout = 600.0,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Load new weights while the server serves: all or nothing, and nothing cached before can match after."""
    local = Path(path).expanduser()
    body = {
        "model_path": str(local.resolve()) if local.exists() else path,
        "weight_version": weight_version,
        "abort_all_requests": abort,
        "load_format": load_format,
        "timeout": timeout,
    }
    answer = _ask("POST", "/update_weights_from_disk", body, url, admin_key, timeout_s=timeout)
    typer.echo(
        f"{answer['message']} {answer['num_tensors']} tensors, version {answer['weight_version']!r}, "
        f"weights_id {answer['weights_id']}. Requests carried over: {answer['num_kept']}, "
        f"aborted: {answer['num_aborted']}."
    )


@weights_app.command()
def version(
    new_version: Annotated[str | None, typer.Argument(help="New label. Without it: print the label.")] = None,
    keep_running: Annotated[
        bool, typer.Option("--keep-running", help="Do not abort requests (while paused none are aborted anyway).")
    ] = False,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Print or change the label of the weights; the cache is not touched."""
    if new_version is None:
        typer.echo(_ask("GET", "/get_weight_version", None, url, admin_key)["weight_version"])
        return
    body = {"new_version": new_version} | ({"abort_all_requests": False} if keep_running else {})
    typer.echo(_ask("POST", "/update_weight_version", body, url, admin_key)["message"])


@weights_app.command()
def get(
    name: Annotated[str, typer.Argument(help="Hugging Face name, for example model.norm.weight.")],
    num_values: Annotated[int, typer.Option(help="How many values, from the first on.", min=1)] = 10,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Print the first values of a parameter, those of each engine."""
    body = {"name": name, "truncate_size": num_values}
    answer = _ask("POST", "/get_weights_by_name", body, url, admin_key)
    typer.echo(f"{answer['name']}  {answer['dtype']}  {'x'.join(map(str, answer['shape']))}")
    for engine in answer["engines"]:
        label = f"engine {engine['dp_rank']}: " if len(answer["engines"]) > 1 else ""
        typer.echo(label + " ".join(f"{value:g}" for value in engine["values"]))


@memory_app.command()
def release(tags: Tags = None, timeout: Timeout = 0.0, url: Url = DEFAULT_URL, admin_key: AdminKey = None) -> None:
    """Give memory back when nothing runs; requests queue until `headwater memory resume`."""
    body = {"tags": tags or [], "timeout": timeout}
    answer = _ask("POST", "/release_memory_occupation", body, url, admin_key, timeout_s=timeout)
    typer.echo(f"Released {answer['num_bytes'] / MIB:,.0f} MiB. Released now: {', '.join(answer['released'])}.")


@memory_app.command(name="resume")
def resume_memory(
    tags: Tags = None, timeout: Timeout = 600.0, url: Url = DEFAULT_URL, admin_key: AdminKey = None
) -> None:
    """Take released memory again and run what has queued."""
    body = {"tags": tags or [], "timeout": timeout}
    answer = _ask("POST", "/resume_memory_occupation", body, url, admin_key, timeout_s=timeout)
    typer.echo(f"Resumed. Still released: {', '.join(answer['released']) or 'nothing'}.")


def _ask(
    method: str, path: str, body: dict[str, Any] | None, url: str, admin_key: str | None, *, timeout_s: float = 0.0
) -> dict[str, Any]:
    try:
        return ask(method, path, url=url, admin_key=admin_key, body=body, timeout_s=timeout_s)
    except ControlError as error:
        raise fail(error) from None
