"""The figures of rounds as tables for a terminal."""

import statistics
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from headwater.bench.percentile import Distribution
from headwater.bench.slo import Slo
from headwater.bench.statistics import Figures
from headwater.bench.turns import Ratio, Round

LATENCIES: tuple[tuple[str, Callable[[Figures], Distribution], float], ...] = (  # label, what, factor
    ("TTFT ms", lambda figures: figures.ttft_s, 1000.0),
    ("ITL ms", lambda figures: figures.itl_s, 1000.0),
    ("TPOT ms", lambda figures: figures.tpot_s, 1000.0),
    ("end to end ms", lambda figures: figures.e2e_s, 1000.0),
    ("tokens/s of a request", lambda figures: figures.request_tokens_per_s, 1.0),
)
COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
BUSY_CORES = 0.8  # of the load generator, which has one
FOREIGN_CORES = 0.15


def rates_of(figures: Figures, *, slo: Slo | None) -> list[tuple[str, str]]:
    """Name and value of what is counted by the second."""
    found = [
        ("requests", f"{figures.num_requests - figures.num_failed:,} in {figures.duration_s:.2f} s"),
        ("failed", f"{figures.num_failed:,}"),
        ("requests/s", f"{figures.requests_per_s:,.2f}"),
        ("output tokens/s", f"{figures.output_tokens_per_s:,.1f}"),
        ("prompt tokens/s", f"{figures.prompt_tokens_per_s:,.1f}"),
        ("prompt tokens cached", f"{figures.cached_share:.1%} of {figures.num_prompt_tokens:,}"),
    ]
    if slo is not None and figures.goodput_per_s is not None:
        met = f"{figures.num_good:,} of {figures.num_requests:,} requests met {slo}"
        found.append(("goodput requests/s", f"{figures.goodput_per_s:,.2f} ({met})"))
    return found


def latency_rows(figures: Figures) -> list[list[str]]:
    """A row for each latency: label and `COLUMNS`."""
    rows = []
    for label, value, factor in LATENCIES:
        found = value(figures)
        if found.count:
            rows.append([label, *(f"{getattr(found, column) * factor:,.1f}" for column in COLUMNS)])
    return rows


def print_round(console: Console, each: Round, *, slo: Slo | None) -> None:
    """Everything about one round."""
    console.print(f"[bold]{each.server}, round {each.number + 1}[/bold] ({each.cold.words})", highlight=False)
    facts = Table.grid(padding=(0, 2))
    for name, value in rates_of(each.figures, slo=slo):
        facts.add_row(name, value)
    console.print(facts, highlight=False)
    table = Table("", *COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in latency_rows(each.figures):
        table.add_row(*row)
    console.print(table, highlight=False)
    for line in notes_of(each):
        console.print(line, highlight=False)


def notes_of(each: Round) -> list[str]:
    """What a reader must know to trust the round."""
    figures = each.figures
    notes = [
        f"load generator: {each.client_us_per_token:.0f} µs of CPU a token, {each.client_cores:.2f} cores"
        + (f"; other processes: {each.foreign_cores:.2f} cores" if each.foreign_cores is not None else "")
    ]
    if each.client_cores > BUSY_CORES:
        notes.append("warning: the load generator was busy nearly all the time; it may be what was measured")
    if (each.foreign_cores or 0.0) > FOREIGN_CORES:
        notes.append("warning: other processes took part of the machine; repeat the round on a quiet one")
    if figures.late_s.p99 > 0.01:
        notes.append(
            f"requests waited up to {1000 * figures.late_s.max:,.0f} ms in the load generator (p99 "
            f"{1000 * figures.late_s.p99:,.0f}), which counts as latency"
        )
    if figures.num_events and not 0.9 < figures.tokens_per_event < 1.1:
        notes.append(f"an event carried {figures.tokens_per_event:.1f} tokens; ITL is the time between events")
    notes += [f"failed {count} times: {error}" for error, count in figures.errors.items()]
    return notes


def print_comparison(console: Console, rounds: Sequence[Round], found: Sequence[Ratio]) -> None:
    """Two servers side by side: medians over the rounds, and ratios round by round."""
    names = list(dict.fromkeys(each.server for each in rounds))
    table = Table("median of rounds", *names, box=box.SIMPLE_HEAD, pad_edge=False)
    for label, value in _COMPARED:
        cells = [statistics.median(value(each.figures) for each in rounds if each.server == name) for name in names]
        table.add_row(label, *(f"{cell:,.1f}" for cell in cells))
    console.print(table, highlight=False)
    table = Table(
        "ratio (above 1: the first is better)", "median", "least", "most", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for each in found:
        table.add_row(each.name, f"{each.median:.2f}", f"{each.least:.2f}", f"{each.most:.2f}")
    console.print(table, highlight=False)


_COMPARED: tuple[tuple[str, Callable[[Figures], float]], ...] = (
    ("output tokens/s", lambda figures: figures.output_tokens_per_s),
    ("TTFT p50 ms", lambda figures: 1000 * figures.ttft_s.p50),
    ("TTFT p99 ms", lambda figures: 1000 * figures.ttft_s.p99),
    ("ITL p50 ms", lambda figures: 1000 * figures.itl_s.p50),
    ("ITL p99 ms", lambda figures: 1000 * figures.itl_s.p99),
    ("end to end p50 ms", lambda figures: 1000 * figures.e2e_s.p50),
    ("prompt tokens cached %", lambda figures: 100 * figures.cached_share),
)
