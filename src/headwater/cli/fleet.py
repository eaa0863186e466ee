"""`headwater fleet`: replicas on this machine that answer as one server."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click
import msgspec

from headwater.cli.command_line import (
    SETTINGS,
    SectionedCommand,
    SectionedOption,
    Target,
    command,
    flag_option,
    group,
    model_options,
    server_options,
)
from headwater.cli.control_client import ControlError, ask, fail
from headwater.launch.config import FLAGS

if TYPE_CHECKING:
    from headwater.ray.fleet_args import FleetArgs

_SECTION = "Fleet"
# the fleet sets them, or has no use for them
_NOT_FOR_FLEETS = ("model", "dp_size", "engine_restarts", "fleet_replica", "stage_weights_on_gpu")

fleet = group("fleet", "Serve with several replicas as one server, on Ray.\n\nNeeds the extra `ray`.")


_LIMITS = ("min_replicas", "max_replicas", "target_ongoing_requests")
_OWN = ("replicas", "cpus", "gpus", "drain_s", "drain_persists", *_LIMITS)


def _up(**options: Any) -> None:
    """Serve one model or several with replicas on this machine.

    Each replica is a Headwater server. A front routes requests to the replica that knows the beginning of the prompt;
    control calls (flush, pause, weights) go to all replicas and get one answer. All options of `headwater serve`
    apply, to every model. Ctrl-C, or `headwater fleet down`, ends everything.
    """
    _require_ray()
    own = {name: options.pop(name) for name in _OWN}
    try:
        models = _models(options.pop("model"), options.pop("models"), options)
        given = {name: value for name, value in (own | options).items() if value is not None}
        args = _read(given | models)
    except (ValueError, OSError) as error:
        raise click.BadParameter(str(error)) from None
    from headwater.ray.cluster import up

    up(args, state_file=state_file(), on_ready=lambda url: click.echo(f"The fleet serves at {url}. Ctrl-C ends it."))


def _models(named: tuple[str, ...], file: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """`model` or `models`, as `headwater.ray:app` takes them. ValueError."""
    if file is not None:
        if named:
            raise ValueError("--models names a file with all models; --model cannot be given as well")
        from headwater.ray.models_file import read_models_file

        return {"models": read_models_file(file)}
    if len(named) <= 1 and not any(_has_name(each) for each in named):
        return {"model": named[0]} if named else {}
    if options.get("served_model_name") is not None:
        raise ValueError("--served-model-name: --model NAME=MODEL names each model already")
    if not all(_has_name(each) for each in named):
        raise ValueError("--model: several models have names, as in --model small=PATH --model large=PATH")
    pairs = [each.partition("=") for each in named]
    return {"models": [{"name": name, "model": model} for name, _, model in pairs]}


def _has_name(value: str) -> bool:
    """Whether this is NAME=MODEL, and no path with such a character in it."""
    name, sign, model = value.partition("=")
    return bool(name and sign and model) and "/" not in name and not Path(value).exists()


def _read(given: dict[str, Any]) -> "dict[str, FleetArgs]":
    """The arguments by model. Each replica gets its share of the cores, unless `--threads` is given."""
    from headwater.launch.model_choice import with_model
    from headwater.ray.fleet_args import read_models

    models = read_models(given | {"is_local": True})
    for args in models.values():
        with_model(args.server)  # a model that is not there, or must be fetched, before Ray starts
    num_replicas = sum(args.max_replicas or args.replicas for args in models.values())
    if num_replicas > 1:
        share = {"threads": max(1, (os.cpu_count() or 1) // num_replicas), "pin_threads": "off"}
        for name, args in models.items():
            if args.server.threads is None and not args.gpus:  # else each replica takes all cores
                server = msgspec.structs.replace(args.server, **share)
                models[name] = msgspec.structs.replace(args, server=server)
    return models


def _own(name: str, **settings: Any) -> SectionedOption:
    return SectionedOption([name], section=_SECTION, show_default=True, **settings)


fleet.add_command(
    SectionedCommand(
        "up",
        callback=_up,
        help=_up.__doc__,
        params=[
            _own("--replicas", type=click.IntRange(1, 1000), default=2, help="Servers, each with its own engine."),
            _own("--cpus", type=click.FloatRange(min=0), default=1.0, help="CPUs of each replica, as Ray counts them."),
            _own("--gpus", type=click.FloatRange(min=0), default=0.0, help="GPUs of each replica."),
            _own(
                "--drain-s",
                type=click.FloatRange(min=0),
                default=600.0,
                help="Seconds that the running requests of a replica that leaves may take.",
            ),
            _own(
                "--drain-persists/--no-drain-persists",
                default=True,
                help="With a store: a replica that leaves copies what it has cached there.",
            ),
            _own("--min-replicas", type=click.IntRange(1, 1000), default=1, help="With --max-replicas: the fewest."),
            _own(
                "--max-replicas",
                type=click.IntRange(1, 1000),
                help="Let the fleet scale itself, up to so many. Without it, `fleet scale` sets the number.",
            ),
            _own(
                "--target-ongoing-requests",
                type=click.FloatRange(min=0, min_open=True),
                default=8.0,
                help="With --max-replicas: requests of each replica, those that wait included.",
            ),
            SectionedOption(
                ["--model"],
                section=_SECTION,
                multiple=True,
                envvar=FLAGS["model"].flag.env,
                help="A folder, a .gguf file, a hub id or a known name. Several as NAME=MODEL, once for each.",
            ),
            SectionedOption(
                ["--models"],
                section=_SECTION,
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="A YAML file: a list of models, each with a `name` and with options of its own.",
            ),
            *(flag_option(name, spec) for name, spec in FLAGS.items() if name not in _NOT_FOR_FLEETS),
        ],
        context_settings=SETTINGS,
    )
)


@fleet.add_command  # type: ignore[arg-type]
@command()
@click.argument("replicas", type=click.IntRange(1, 1000), required=False)
@click.option("--min", "min_replicas", type=click.IntRange(1, 1000), help="With --max: the fewest; 1 by default.")
@click.option("--max", "max_replicas", type=click.IntRange(1, 1000), help="Let the fleet scale itself, up to so many.")
@click.option(
    "--target", "requests_each", type=click.FloatRange(min=0, min_open=True), help="With --max: requests of a replica."
)
@model_options
def scale(
    replicas: int | None,
    min_replicas: int | None,
    max_replicas: int | None,
    requests_each: float | None,
    target: Target,
) -> None:
    """Change the number of replicas, or let the fleet do that. Those that leave end their running requests first."""
    limits = {"min_replicas": min_replicas, "max_replicas": max_replicas, "target_ongoing_requests": requests_each}
    given = {name: value for name, value in limits.items() if value is not None}
    if (replicas is None) == (max_replicas is None) or (replicas is not None and given):
        raise click.UsageError("give a number of replicas, or --max with --min and --target")
    query = urlencode(given if replicas is None else {"replicas": replicas})
    try:
        ask("POST", f"/fleet/scale?{query}", target=target)
    except ControlError as error:
        raise fail(error) from None
    goal = f"scales itself up to {max_replicas} replicas" if replicas is None else f"goes to {replicas} replicas"
    click.echo(f"The fleet {goal}; `headwater fleet status` shows them.")


@fleet.add_command  # type: ignore[arg-type]
@command()
@server_options
def status(target: Target) -> None:
    """List the replicas: which take requests, and why the others do not."""
    try:
        replicas = ask("GET", "/fleet", target=target)["replicas"]
    except ControlError as error:
        raise fail(error) from None
    for each in replicas:
        standing = "serves" if each["serving"] else f"takes no requests: {each['message']}"
        standing += ", paused" if each["paused"] else ""
        standing += f", memory released: {', '.join(each['released'])}" if each["released"] else ""
        model = f"{each['model']:16} " if "model" in each else ""
        click.echo(f"{model}{each['dp_rank']:4} {each['url']:28} {each['num_running']:4} running  {standing}")


@fleet.add_command  # type: ignore[arg-type]
@command()
def down() -> None:
    """End the fleet that `headwater fleet up` serves on this machine."""
    from headwater.fleet.local_fleet import running_fleet

    try:
        running_fleet(state_file()).end()
    except (ValueError, TimeoutError) as error:
        raise click.ClickException(str(error)) from None
    click.echo("The fleet has ended.")


def state_file() -> Path:
    """Where `up` notes its process and the address of its Ray."""
    folder = os.environ.get("HEADWATER_FLEET_STATE") or "~/.cache/headwater/fleet"
    return Path(folder).expanduser() / "local.json"


def _require_ray() -> None:
    if find_spec("ray") is None or find_spec("ray.serve") is None:
        click.echo("A fleet needs Ray: pip install 'headwater[ray]'", err=True)
        sys.exit(2)
