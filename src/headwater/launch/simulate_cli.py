"""`headwater simulate`: random runs of the real engine against faults, and plans of fleets, in virtual time."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
import typer

from headwater.launch.plan_args import PlanArgs
from headwater.simulation.profiles import PROFILES

Seed = Annotated[int | None, typer.Option(help="First seed; random, and printed, when not given.", min=0)]
Runs = Annotated[int, typer.Option(help="How many runs, one seed each.", min=1)]
TurnsPerRun = Annotated[int, typer.Option("--turns", help="Turns of each run.", min=1)]
ProfileName = Annotated[str, typer.Option("--profile", help=f"One of {', '.join(PROFILES)}, or all.")]
Jobs = Annotated[int, typer.Option(help="Processes; 0: one a core.", min=0)]
ReplayFile = Annotated[Path | None, typer.Option("--replay", help="Play a failed run again, from its file.")]
SaveFile = Annotated[Path | None, typer.Option("--save", help="Where a failed run is written.")]
Shrinks = Annotated[bool, typer.Option("--shrink/--no-shrink", help="Cut a failed run down before it is written.")]
IsPlan = Annotated[bool, typer.Option("--plan", help="Serve a workload with planned fleets, and compare them.")]
_PANEL = "With --plan"


def takes_plan_args(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command`, whose last parameter is `plan_args`, an option for each field of `PlanArgs` instead."""

    specs = msgspec.structs.fields(PlanArgs)

    def run(**options: Any) -> None:
        plan_args = PlanArgs(**{each.name: options.pop(each.name) for each in specs})
        command(**options, plan_args=plan_args)

    own = [each for name, each in inspect.signature(command).parameters.items() if name != "plan_args"]
    hints = get_type_hints(PlanArgs, include_extras=True)
    added = []
    for each in specs:
        kind, text = get_args(hints[each.name])
        option = typer.Option(help=text, rich_help_panel=_PANEL, show_default=each.default not in (None, ""))
        added.append(
            inspect.Parameter(
                each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=Annotated[kind, option]
            )
        )
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    return run


@takes_plan_args
def simulate(
    seed: Seed = None,
    runs: Runs = 20,
    turns: TurnsPerRun = 5000,
    profile: ProfileName = "all",
    jobs: Jobs = 1,
    replay_file: ReplayFile = None,
    save: SaveFile = None,
    shrinks: Shrinks = True,
    is_plan: IsPlan = False,
    *,
    plan_args: PlanArgs,
) -> None:
    """Run the real loop, scheduler, cache and control plane through random load, operations and faults.

    Exits with 1 at the first broken promise, and writes down what it takes to see it again. With --plan, serve
    a workload with fleets at their real speed instead, in virtual time: hit rates, times, throughput.
    """
    from headwater.launch.plan_runs import play_plan
    from headwater.launch.simulation_runs import play_again, play_campaign

    try:
        if not is_plan and plan_args.changed():
            raise ValueError(f"--{plan_args.changed()[0].replace('_', '-')} needs --plan")
        if is_plan:
            play_plan(plan_args, seed=seed or 0)
            return
        if replay_file is not None:
            has_kept = play_again(replay_file)
        else:
            has_kept = play_campaign(
                seed, num_runs=runs, turns_per_run=turns, profile=profile, num_jobs=jobs, save=save, shrinks=shrinks
            )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not has_kept:
        raise typer.Exit(1)
