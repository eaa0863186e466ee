"""`headwater fleet`: replicas on this machine that answer as one server."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from headwater.cli.command_line import SETTINGS, SectionedCommand, SectionedOption, command, group, server_options
from headwater.cli.control_client import ControlError, ask, fail
from headwater.cli.serve import flag_option
from headwater.launch.config import FLAGS, ServerArgs

_SECTION = "Fleet"
_NOT_FOR_FLEETS = ("dp_size", "engine_restarts", "fleet_replica")  # the fleet sets them

fleet = group("fleet", "Serve with several replicas as one server, on Ray.\n\nNeeds the extra `ray`.")


def _up(replicas: int, cpus: float, gpus: float, drain_s: float, **options: Any) -> None:
    """Serve a model with several replicas on this machine.

    Each replica is a Headwater server. A front routes requests to the replica that knows the beginning of the prompt;
    control calls (flush, pause, weights) go to all replicas and get one answer. All options of `headwater serve`
    apply. Ctrl-C, or `headwater fleet down`, ends everything.
    """
    _require_ray()
    try:
        given = ServerArgs(**options)
        if given.threads is None and not gpus and replicas > 1:  # else each replica takes all cores
            options |= {"threads": max(1, (os.cpu_count() or 1) // replicas), "pin_threads": "off"}
        from headwater.launch.model_choice import with_model
        from headwater.ray.fleet_args import read_fleet_args

        own = {"replicas": replicas, "cpus": cpus, "gpus": gpus, "drain_s": drain_s, "is_local": True}
        with_model(given)  # a model that is not there, or must be fetched, before Ray starts
        args = read_fleet_args(own | {name: value for name, value in options.items() if value is not None})
    except (ValueError, OSError) as error:
        raise click.BadParameter(str(error)) from None
    from headwater.ray.cluster import up

    up(args, state_file=state_file(), on_ready=lambda url: click.echo(f"The fleet serves at {url}. Ctrl-C ends it."))


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
            *(flag_option(name, spec) for name, spec in FLAGS.items() if name not in _NOT_FOR_FLEETS),
        ],
        context_settings=SETTINGS,
    )
)


@fleet.add_command  # type: ignore[arg-type]
@command()
@click.argument("replicas", type=click.IntRange(1, 1000))
@server_options
def scale(replicas: int, url: str, admin_key: str | None) -> None:
    """Change the number of replicas. Those that leave end their running requests first."""
    try:
        ask("POST", f"/fleet/scale?replicas={replicas}", url=url, admin_key=admin_key)
    except ControlError as error:
        raise fail(error) from None
    click.echo(f"The fleet goes to {replicas} replicas; `headwater fleet status` shows them.")


@fleet.add_command  # type: ignore[arg-type]
@command()
@server_options
def status(url: str, admin_key: str | None) -> None:
    """List the replicas: which take requests, and why the others do not."""
    try:
        replicas = ask("GET", "/fleet", url=url, admin_key=admin_key)["replicas"]
    except ControlError as error:
        raise fail(error) from None
    for each in replicas:
        standing = "serves" if each["serving"] else f"takes no requests: {each['message']}"
        click.echo(f"{each['dp_rank']:4} {each['url']:28} {each['num_running']:4} running  {standing}")


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
