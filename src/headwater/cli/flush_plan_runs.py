"""The work of `headwater simulate --plan --fleet-flush N`: flushes of large fleets, and their table."""

import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from headwater.cli.plan_args import PlanArgs
from headwater.cli.plan_runs import numbers, whole_numbers
from headwater.fleet.planned.flush_plan import FlushFigures, FlushTrial, play_flushes
from headwater.fleet.planned.stand_in import Steps
from headwater.planning.cost_model import CostModel
from headwater.planning.find_model import find_model
from headwater.planning.fleet_result import percentile
from headwater.planning.hardware import find_hardware

_CONTEXT, _CHUNK = 1024, 2048  # tokens behind each stream, and in a chunk of a prompt


def play_flush_plan(args: PlanArgs, *, seed: int) -> bool:
    """Print a row for each combination. Whether no request matched a stale page. ValueError for bad arguments."""
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"{args.json.parent} is no folder")
    trials = _trials(args, seed=seed)
    started_s = time.monotonic()
    level = logging.getLogger("headwater.fleet").level
    logging.getLogger("headwater.fleet").setLevel(logging.ERROR)  # a line for each lost ping
    try:
        with click.progressbar(length=len(trials) * args.flushes, label="flushes") as bar:
            figures = [play_flushes(trial, on_flush=lambda: bar.update(1)) for _, trial in trials]
    finally:
        logging.getLogger("headwater.fleet").setLevel(level)
    rows = [_facts(streams, trial, each) for (streams, trial), each in zip(trials, figures, strict=True)]
    click.echo(
        f"{args.fleet_flush} replicas, {args.model} on {args.hardware}, {args.flushes} flushes (mode=now) each; around "
        f"each, {args.faults:.1%} of the replicas are killed or stand still"
    )
    _print_table(rows)
    num_stale = sum(each.num_stale for each in figures)
    num_requests = sum(each.num_requests for each in figures)
    click.echo(f"{num_requests:,} requests, {num_stale} stale, in {time.monotonic() - started_s:.1f} s")
    if args.json is not None:
        args.json.write_text(json.dumps({"flushes": rows}, indent=1) + "\n")
    return num_stale == 0


def _trials(args: PlanArgs, *, seed: int) -> list[tuple[int, FlushTrial]]:
    """Every combination with its number of streams."""
    costs = CostModel(find_model(args.model), find_hardware(args.hardware))
    streams = whole_numbers("flush-streams", args.flush_streams)
    combined = itertools.product(numbers("loss", args.loss), streams, numbers("flush-timeout", args.flush_timeout))
    return [
        (
            num_streams,
            FlushTrial(
                num_replicas=args.fleet_flush,
                steps=_steps(costs, num_streams),
                timeout_s=timeout_s,
                loss=loss,
                faults=args.faults,
                num_flushes=args.flushes,
                seed=seed,
            ),
        )
        for loss, num_streams, timeout_s in combined
    ]


def _steps(costs: CostModel, num_streams: int) -> Steps:
    def step_s(chunk: int) -> float:
        return costs.seconds(
            num_tokens=num_streams + chunk,
            num_rows=num_streams + bool(chunk),
            num_samples=num_streams,
            num_read=num_streams * _CONTEXT + chunk,
            num_scores=num_streams * _CONTEXT + chunk * (chunk + 1) / 2,
        )

    return Steps(decode_s=step_s(0), prefill_s=step_s(_CHUNK))


def _facts(streams: int, trial: FlushTrial, figures: FlushFigures) -> dict[str, Any]:
    answered_s, back_s = sorted(figures.answered_s), sorted(figures.back_s)
    return {
        "loss": trial.loss,
        "streams": streams,
        "timeout_s": trial.timeout_s,
        "steps": asdict(trial.steps),
        "answered_p50_s": percentile(answered_s, 50),
        "answered_max_s": answered_s[-1],
        "statuses": {str(status): count for status, count in sorted(figures.statuses.items())},
        "pending_mean": sum(figures.num_pending) / len(figures.num_pending),
        "pending_max": max(figures.num_pending),
        "back_p50_s": percentile(back_s, 50),
        "back_p99_s": percentile(back_s, 99),
        "num_requests": figures.num_requests,
        "num_stale": figures.num_stale,
    }


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    headings = ("loss", "streams", "timeout\ns", "answered s\np50 / max", "200 / 202", "pending\nmean / max",
                "back after s\np50 / p99", "stale")  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        statuses = row["statuses"]
        done, accepted = statuses.get("200", 0), statuses.get("202", 0)
        others = sum(statuses.values()) - done - accepted
        table.add_row(
            f"{row['loss']:.1%}",
            str(row["streams"]),
            f"{row['timeout_s']:g}",
            f"{row['answered_p50_s']:.2f} / {row['answered_max_s']:.2f}",
            f"{done} / {accepted}" + (f" / {others} others" if others else ""),
            f"{row['pending_mean']:.1f} / {row['pending_max']}",
            f"{row['back_p50_s']:.2f} / {row['back_p99_s']:.1f}",
            str(row["num_stale"]),
        )
    Console().print(table)
