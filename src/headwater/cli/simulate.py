"""`headwater simulate`: random runs of the real engine with faults, and plans of fleets, in virtual time."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import msgspec

from headwater.cli.command_line import SectionedOption, command, option_type
from headwater.cli.plan_args import FLUSH_OPTIONS, PlanArgs
from headwater.launch.flags import without_none
from headwater.simulation.random_runs.profiles import PROFILES


def takes_plan_args(function: Any) -> Any:
    """Replace the last parameter of `function`, `plan_args`, by an option for each field of `PlanArgs`."""
    fields = msgspec.structs.fields(PlanArgs)
    hints = get_type_hints(PlanArgs, include_extras=True)

    def run(**options: Any) -> None:
        plan_args = PlanArgs(**{each.name: options.pop(each.name) for each in fields})
        function(**options, plan_args=plan_args)

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    for each in reversed(fields):
        kind, text = get_args(hints[each.name])
        kind, _ = without_none(kind)
        click.option(
            "--" + each.name.replace("_", "-"),
            each.name,
            cls=SectionedOption,
            section="With --plan",
            type=option_type(kind),
            default=each.default,
            show_default=each.default not in (None, ""),
            help=text,
        )(run)
    return run


@command()
@click.option("--seed", type=click.IntRange(min=0), help="First seed. Default: a random one, which is printed.")
@click.option("--runs", type=click.IntRange(min=1), default=20, show_default=True, help="Number of runs.")
@click.option("--turns", type=click.IntRange(min=1), default=5000, show_default=True, help="Turns of each run.")
@click.option("--profile", type=str, default="all", show_default=True, help=f"One of {', '.join(PROFILES)}, or all.")
@click.option("--jobs", type=click.IntRange(min=0), default=1, show_default=True, help="Processes; 0: one per core.")
@click.option("--replay", "replay_file", type=click.Path(path_type=Path), help="Repeat a failed run from its file.")
@click.option("--save", type=click.Path(path_type=Path), help="Write a failed run to this file.")
@click.option(
    "--shrink/--no-shrink",
    "shrinks",
    default=True,
    show_default=True,
    help="Shorten a failed run before it is written.",
)
@click.option(
    "--fleet",
    "is_fleet",
    is_flag=True,
    help="Simulate servers with several engines: all-or-nothing changes, crashes, silent engines, late answers.",
)
@click.option(
    "--trainers",
    "has_trainers",
    is_flag=True,
    help="The same with trainers that send tensors: slow, torn, repeated and reordered buckets, trainers that die.",
)
@click.option("--plan", "is_plan", is_flag=True, help="Run a workload on planned fleets, and compare the fleets.")
@takes_plan_args
def simulate(
    seed: int | None,
    runs: int,
    turns: int,
    profile: str,
    jobs: int,
    replay_file: Path | None,
    save: Path | None,
    shrinks: bool,
    is_fleet: bool,
    has_trainers: bool,
    is_plan: bool,
    *,
    plan_args: PlanArgs,
) -> None:
    """Run the real engine through random load, operations and faults.

    Loop, scheduler, cache and control plane are those of the server. At the first broken promise the command writes a
    file that repeats the failure, and exits with 1. With --plan, the command instead serves a workload with fleets at
    their real speed, in virtual time, and reports hit rates, latencies and throughput. With --plan --fleet-flush N, it
    flushes a fleet of N replicas that loses messages and processes; if a request matched a stale page, it exits with 1.
    """
    from headwater.cli.flush_plan_runs import play_flush_plan
    from headwater.cli.plan_runs import play_plan
    from headwater.cli.simulation_runs import play_again, play_campaign, play_fleets

    try:
        if not is_plan and plan_args.changed():
            raise ValueError(f"--{plan_args.changed()[0].replace('_', '-')} needs --plan")
        if not plan_args.fleet_flush and (unused := FLUSH_OPTIONS.intersection(plan_args.changed())):
            raise ValueError(f"--{min(unused).replace('_', '-')} needs --fleet-flush")
        if is_plan and not plan_args.fleet_flush:
            play_plan(plan_args, seed=seed or 0)
            return
        if is_plan:
            has_kept = play_flush_plan(plan_args, seed=seed or 0)
        elif is_fleet or has_trainers:
            has_kept = play_fleets(seed, num_runs=runs, turns_per_run=turns, has_trainers=has_trainers)
        elif replay_file is not None:
            has_kept = play_again(replay_file)
        else:
            has_kept = play_campaign(
                seed, num_runs=runs, turns_per_run=turns, profile=profile, num_jobs=jobs, save=save, shrinks=shrinks
            )
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if not has_kept:
        raise click.exceptions.Exit(1)
