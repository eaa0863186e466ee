"""The work of `headwater simulate --plan`, after its arguments are parsed."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from headwater.cache.host_tier import WritePolicy
from headwater.cache.storage.tier import PrefetchPolicy
from headwater.cli.plan_args import PlanArgs
from headwater.launch.config import GB
from headwater.planning.comparison import Compared, FleetSizes, all_sizes, compare
from headwater.planning.find_model import find_model
from headwater.planning.fleet_result import TIERS
from headwater.planning.hardware import find_hardware
from headwater.planning.plan_page import plan_page
from headwater.planning.planned_engine import EnginePlan
from headwater.planning.synthetic import SyntheticWorkload
from headwater.planning.trace import PlannedRequest, read_trace
from headwater.scheduling.prefill_pace import CPU_MAX_GAP_S


def play_plan(args: PlanArgs, *, seed: int) -> None:
    """Run the workload on every fleet, print the figures, write the requested files. ValueError for bad arguments."""
    for path in (args.html, args.png, args.json):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path.parent} is no folder")
    if args.png is not None:
        _matplotlib()
    fleets = [(sizes, engine_plan(args, sizes)) for sizes in fleet_sizes(args)]
    trace = workload_of(args, seed=seed)
    base = fleets[0][1]
    workload = args.describe_workload(len(trace))
    started_s = time.monotonic()
    with click.progressbar(length=len(fleets) * len(trace), label="requests") as bar:
        compared = list(compare(fleets, trace, on_end=lambda: bar.update(1)))
    click.echo(f"{base.model.name} on {base.hardware.name}: {workload}")
    _print_table(compared)
    click.echo(
        f"{sum(each.result.duration_s for each in compared):,.0f} s of serving, "
        f"{sum(each.result.num_steps for each in compared):,} steps, in {time.monotonic() - started_s:.1f} s"
    )
    if args.html is not None:
        args.html.write_text(plan_page(compared, workload=workload), encoding="utf-8")
    if args.png is not None:
        _write_png(compared, args.png)
    if args.json is not None:
        args.json.write_text(json.dumps(_as_json(compared, workload), indent=1) + "\n")


def workload_of(args: PlanArgs, *, seed: int) -> list[PlannedRequest]:
    """The requests of a file or of the synthetic workload. ValueError for an unreadable file or impossible sizes."""
    if args.trace is not None:
        return read_trace(args.trace)
    synthetic = SyntheticWorkload(
        num_requests=args.requests,
        requests_per_s=args.rate,
        num_prefixes=args.prefixes,
        prefix_tokens=args.prefix_tokens,
        zipf=args.zipf,
        turns_per_session=args.session_turns,
        think_s=args.think_s,
        user_tokens=args.user_tokens,
        output_tokens=args.output_tokens,
        seed=seed,
    )
    return synthetic.requests()


def engine_plan(args: PlanArgs, sizes: FleetSizes) -> EnginePlan:
    """The setup of each engine. ValueError for impossible sizes."""
    hardware = find_hardware(args.hardware)
    max_running, chunk_tokens = (256, 2048) if hardware.is_async else (64, 512)
    return EnginePlan(
        model=find_model(args.model),
        hardware=hardware,
        page_size=args.page_size,
        max_running=max_running if args.max_running is None else args.max_running,
        prefill_chunk_tokens=chunk_tokens if args.chunk_tokens is None else args.chunk_tokens,
        max_gap_s=CPU_MAX_GAP_S if args.chunk_tokens is None and not hardware.is_async else None,
        policy=args.schedule_policy,
        write_policy=WritePolicy(args.write_policy),
        prefetch_policy=PrefetchPolicy(args.prefetch_policy),
        device_bytes=None if sizes.device_gb is None else sizes.device_gb * GB,
        host_bytes=sizes.host_gb * GB,
        storage_bytes=sizes.storage_gb * GB,
        tp_size=sizes.tp_size,
    )


def fleet_sizes(args: PlanArgs) -> list[FleetSizes]:
    """Every combination of the lists. ValueError for a malformed list."""
    engines, tp_size = whole_numbers("engines", args.engines), whole_numbers("tp-size", args.tp_size)
    device_gb: list[float | None] = [*numbers("device-gb", args.device_gb)] if args.device_gb else [None]
    host_gb, storage_gb = numbers("host-gb", args.host_gb), numbers("storage-gb", args.storage_gb)
    return all_sizes(engines, device_gb, host_gb, storage_gb, tp_size)


def whole_numbers(name: str, text: str) -> list[int]:
    """The numbers of a comma-separated list. ValueError for anything else, and for 0."""
    found = numbers(name, text)
    if any(number != int(number) or number < 1 for number in found):
        raise ValueError(f"{name} must be whole numbers of at least 1, found {text!r}")
    return [int(number) for number in found]


def numbers(name: str, text: str) -> list[float]:
    """The numbers of a comma-separated list. ValueError for anything else."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= number < math.inf for number in found):
        raise ValueError(f"{name} must be numbers of at least 0 with commas between, found {text!r}")
    return found


def _print_table(compared: Sequence[Compared]) -> None:
    table = Table("fleet", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("found on device\n/ host / store", "TTFT s\np50 / p99", "ITL ms\np50", "output\ntok/s", "busy"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in compared:
        summary = each.result.summary()
        refused = f" ({each.result.num_refused} refused)" if each.result.num_refused else ""
        table.add_row(
            each.label + refused,
            " / ".join(f"{summary[f'hit_rate_{tier}']:.1%}" for tier in TIERS),
            f"{summary['ttft_p50_s']:.3f} / {summary['ttft_p99_s']:.3f}",
            f"{summary['itl_p50_s'] * 1000:.1f}",
            f"{summary['output_tokens_per_s']:,.0f}",
            f"{summary['utilization']:.0%}",
        )
    Console().print(table)


def _as_json(compared: Sequence[Compared], workload: str) -> dict[str, Any]:
    base = compared[0].plan
    return {
        "workload": workload,
        "model": asdict(base.model),
        "hardware": asdict(base.hardware),
        "fleets": [
            {**asdict(each.sizes), **each.result.summary(), "moved_pages": each.result.moved_pages} for each in compared
        ],
    }


def _matplotlib() -> Any:
    """matplotlib with its backend for files. ValueError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("png needs matplotlib: pip install 'headwater[plot]'") from None
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _write_png(compared: Sequence[Compared], path: Path) -> None:
    plot = _matplotlib()
    labels = [each.label for each in compared]
    figure, (hits, curves, rates) = plot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    left = [0.0] * len(compared)
    for tier in TIERS:
        shares = [each.result.hit_rate(tier) for each in compared]
        hits.barh(labels, shares, left=left, label=tier)
        left = [done + share for done, share in zip(left, shares, strict=True)]
    hits.set_title("prompt tokens found, by tier")
    hits.set_xlim(0, 1)
    hits.legend(loc="lower right")
    for each in compared:
        times = each.result.ttft_s
        curves.plot(times, [(rank + 1) / len(times) for rank in range(len(times))], label=each.label)
    curves.set_xscale("log")
    curves.set_title("share of requests by time to first token, s")
    curves.legend(loc="lower right")
    rates.barh(labels, [each.result.summary()["output_tokens_per_s"] for each in compared])
    rates.set_title("output tokens a second")
    for axes in (hits, rates):
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)
    plot.close(figure)
