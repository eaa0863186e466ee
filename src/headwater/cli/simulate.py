"""`headwater simulate`: random runs of the real engine against faults, and plans of fleets, in virtual time."""

from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import msgspec

from headwater.cli.command_line import SectionedOption, command, option_type
from headwater.cli.plan_args import PlanArgs
from headwater.launch.flags import without_none
from headwater.simulation.random_runs.profiles import PROFILES


def takes_plan_args(function: Any) -> Any:
    """Give `function`, whose last parameter is `plan_args`, an option for each field of `PlanArgs` instead."""
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
@click.option("--seed", type=click.IntRange(min=0), help="First seed; random, and printed, when not given.")
@click.option("--runs", type=click.IntRange(min=1), default=20, show_default=True, help="How many runs, one seed each.")
@click.option("--turns", type=click.IntRange(min=1), default=5000, show_default=True, help="Turns of each run.")
@click.option("--profile", type=str, default="all", show_default=True, help=f"One of {', '.join(PROFILES)}, or all.")
@click.option("--jobs", type=click.IntRange(min=0), default=1, show_default=True, help="Processes; 0: one a core.")
@click.option(
    "--replay", "replay_file", type=click.Path(path_type=Path), help="Play a failed run again, from its file."
)
@click.option("--save", type=click.Path(path_type=Path), help="Where a failed run is written.")
@click.option(
    "--shrink/--no-shrink",
    "shrinks",
    default=True,
    show_default=True,
    help="Cut a failed run down before it is written.",
)
@click.option(
    "--fleet",
    "is_fleet",
    is_flag=True,
    help="Servers of several engines: changes that all make or none, deaths, silence, late answers.",
)
@click.option("--plan", "is_plan", is_flag=True, help="Serve a workload with planned fleets, and compare them.")
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
    is_plan: bool,
    *,
    plan_args: PlanArgs,
) -> None:
    """Run the real engine through random load, operations and faults.

    Loop, scheduler, cache and control plane are the server's own. Exits with 1 at the first broken promise, and
    writes down what it takes to see it again. With --plan, serve a workload with fleets at their real speed
    instead, in virtual time: hit rates, times, throughput.
    """
    from headwater.cli.plan_runs import play_plan
    from headwater.cli.simulation_runs import play_again, play_campaign, play_fleets

    try:
        if not is_plan and plan_args.changed():
            raise ValueError(f"--{plan_args.changed()[0].replace('_', '-')} needs --plan")
        if is_plan:
            play_plan(plan_args, seed=seed or 0)
            return
        if is_fleet:
            has_kept = play_fleets(seed, num_runs=runs, turns_per_run=turns)
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
