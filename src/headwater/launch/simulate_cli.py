"""`headwater simulate`: random runs of the real engine against faults, in virtual time."""

from pathlib import Path
from typing import Annotated

import typer

from headwater.simulation.profiles import PROFILES

Seed = Annotated[int | None, typer.Option(help="First seed; random, and printed, when not given.", min=0)]
Runs = Annotated[int, typer.Option(help="How many runs, one seed each.", min=1)]
TurnsPerRun = Annotated[int, typer.Option("--turns", help="Turns of each run.", min=1)]
ProfileName = Annotated[str, typer.Option("--profile", help=f"One of {', '.join(PROFILES)}, or all.")]
Jobs = Annotated[int, typer.Option(help="Processes; 0: one a core.", min=0)]
ReplayFile = Annotated[Path | None, typer.Option("--replay", help="Play a failed run again, from its file.")]
SaveFile = Annotated[Path | None, typer.Option("--save", help="Where a failed run is written.")]
Shrinks = Annotated[bool, typer.Option("--shrink/--no-shrink", help="Cut a failed run down before it is written.")]


def simulate(
    seed: Seed = None,
    runs: Runs = 20,
    turns: TurnsPerRun = 5000,
    profile: ProfileName = "all",
    jobs: Jobs = 1,
    replay_file: ReplayFile = None,
    save: SaveFile = None,
    shrinks: Shrinks = True,
) -> None:
    """Run the real loop, scheduler, cache and control plane through random load, operations and faults.

    Exits with 1 at the first broken promise, and writes down what it takes to see it again.
    """
    from headwater.launch.simulation_runs import play_again, play_campaign

    try:
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
