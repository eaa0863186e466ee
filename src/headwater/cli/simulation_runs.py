"""The work of `headwater simulate`, after its arguments are parsed."""

import os
import random
import time
from pathlib import Path

import click

from headwater.simulation.fleet.run import FleetRunResult, fleet_run
from headwater.simulation.fleet.transfer_run import TransferRun
from headwater.simulation.random_runs.campaign import Campaign, run_campaign
from headwater.simulation.random_runs.events import decode_trace, describe, encode_trace
from headwater.simulation.random_runs.run import Failure, RunResult, replay
from headwater.simulation.random_runs.shrink import shrink

_NUM_SHOWN_EVENTS = 12
_SHRINK_S = 60.0


def play_campaign(
    seed: int | None,
    *,
    num_runs: int,
    turns_per_run: int,
    profile: str,
    num_jobs: int,
    save: Path | None,
    shrinks: bool,
) -> bool:
    """Whether every promise was kept; one failure is reported and written to a file. ValueError for bad arguments."""
    first_seed = random.SystemRandom().randrange(10**9) if seed is None else seed
    num_jobs = num_jobs or os.cpu_count() or 1
    campaign = Campaign(first_seed, num_runs, turns_per_run, profile=profile, num_jobs=num_jobs)
    click.echo(f"seeds {first_seed} to {first_seed + num_runs - 1}, {turns_per_run} turns each, profile {profile}")
    started_s = time.monotonic()
    results: list[RunResult] = []
    with click.progressbar(length=num_runs * turns_per_run, label="turns") as bar:
        for result in run_campaign(campaign, on_turns=bar.update):
            results.append(result)
            if result.failure is not None:
                break
    _tell(results, time.monotonic() - started_s)
    failure = results[-1].failure
    if failure is not None:
        _write_down(failure, save, shrinks=shrinks)
    return failure is None


def play_fleets(seed: int | None, *, num_runs: int, turns_per_run: int, has_trainers: bool = False) -> bool:
    """Whether servers with several engines kept every promise; the seed of a failure is printed and repeats it."""
    first_seed = random.SystemRandom().randrange(10**9) if seed is None else seed
    click.echo(f"seeds {first_seed} to {first_seed + num_runs - 1}, {turns_per_run} turns each, several engines")
    results: list[FleetRunResult] = []
    started_s = time.monotonic()
    for each in range(first_seed, first_seed + num_runs):
        results.append(fleet_run(each, num_turns=turns_per_run, kind=TransferRun if has_trainers else None))
        if results[-1].failure is not None:
            break
    num_turns, seconds = sum(result.num_turns for result in results), time.monotonic() - started_s
    click.echo(
        f"{len(results)} runs, {num_turns:,} turns, {sum(r.num_changes for r in results):,} changes, "
        f"{sum(r.num_requests for r in results):,} requests, {sum(r.num_deaths for r in results):,} deaths; "
        f"{num_turns / max(seconds, 1e-9):,.0f} turns/s"
    )
    failure = results[-1].failure
    if failure is not None:
        click.secho(f"seed {results[-1].seed}, turn {failure.turn}:\n{failure.message}", fg="red")
        option = "--trainers" if has_trainers else "--fleet"
        click.echo(f"again: headwater simulate {option} --runs 1 --seed {results[-1].seed} --turns {turns_per_run}")
    return failure is None


def play_again(path: Path) -> bool:
    """Whether the run in a file keeps every promise now. ValueError if it cannot be read."""
    try:
        trace = decode_trace(path.read_bytes())
    except (OSError, ValueError) as error:  # msgspec's decoding errors are ValueErrors
        raise ValueError(f"{path}: {error}") from None
    result = replay(trace)
    if result.failure is not None:
        _describe(result.failure)
        return False
    click.echo(f"every promise was kept in {result.num_turns} turns")
    return True


def _tell(results: list[RunResult], seconds: float) -> None:
    num_turns = sum(result.num_turns for result in results)
    click.echo(
        f"{len(results)} runs, {num_turns:,} turns, {sum(r.num_requests for r in results):,} requests, "
        f"{sum(r.num_calls for r in results):,} calls, {sum(r.num_pages_reused for r in results):,} pages reused; "
        f"{num_turns / max(seconds, 1e-9):,.0f} turns/s"
    )


def _write_down(failure: Failure, path: Path | None, *, shrinks: bool) -> None:
    """Print the failure, shorten its run, and write the run to a file."""
    _describe(failure)
    trace = failure.trace
    if shrinks:
        until_s = time.monotonic() + _SHRINK_S
        shorter = shrink(failure, may_go_on=lambda num_events: time.monotonic() < until_s)
        click.echo(f"cut from {len(trace.events)} events to {len(shorter.trace.events)}:")
        _describe(shorter)
        trace = shorter.trace
    path = path or Path(f"headwater-simulation-{trace.seed}.json")
    path.write_bytes(encode_trace(trace))
    click.echo(f"again: headwater simulate --replay {path}")


def _describe(failure: Failure) -> None:
    click.secho(f"seed {failure.trace.seed}, profile {failure.trace.profile}, turn {failure.turn}:", fg="red")
    click.secho(failure.message, fg="red")
    for event in failure.trace.events[-_NUM_SHOWN_EVENTS:]:
        click.echo(f"  {describe(event)}")
