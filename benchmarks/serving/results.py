"""The results of a measurement, as a table and as a JSON file with its origin."""

import datetime
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headwater.bench.record import machine
from load_client import Record

RESULTS = Path(__file__).resolve().parent.parent / "results"

# (workload, figure in its records, whether more is better, label)
FIGURES = (
    ("W1", "decode_tokens_per_s", True, "W1 decode tok/s"),
    ("W1", "ttft_p50_s", False, "W1 TTFT s"),
    ("W2", "output_tokens_per_s", True, "W2 output tok/s"),
    ("W2", "ttft_p50_s", False, "W2 TTFT p50 s"),
    ("W2", "ttft_p99_s", False, "W2 TTFT p99 s"),
    ("W4", "prefill_tokens_per_s", True, "W4 prefill tok/s"),
    ("W3_warm", "total_s", False, "W3 warm total s"),
    ("W3_warm", "ttft_p50_s", False, "W3 warm TTFT p50 s"),
    ("W3_warm", "num_cached_tokens", True, "W3 warm cached tokens"),
    ("W3_cold_shared", "total_s", False, "W3 cold shared total s"),
    ("W3_distinct", "total_s", False, "W3 distinct total s"),
)


def values(records: Sequence[Record], *, server: str, workload: str, figure: str) -> list[float]:
    return [
        record[figure]
        for record in records
        if record["server"] == server and record["workload"] == workload and figure in record
    ]


def table(records: Sequence[Record], servers: Sequence[str]) -> str:
    """A Markdown table: median (least..most) per server; with two servers also the ratio of the medians.

    A dash stands for what was not measured.

    The ratio is written so that more than 1 means that the first server is the better one.
    """
    ratio = len(servers) == 2
    lines = [" | ".join(["", *servers, "ratio"][: len(servers) + 1 + ratio])]
    lines.append(" | ".join(["---"] * (len(servers) + 1 + ratio)))
    for workload, figure, more_is_better, label in FIGURES:
        columns = [values(records, server=s, workload=workload, figure=figure) for s in servers]
        if not any(columns):
            continue
        cells = [label, *(_spread(column) for column in columns)]
        if ratio and all(columns):
            ours, theirs = (statistics.median(column) for column in columns)
            better, worse = (ours, theirs) if more_is_better else (theirs, ours)
            cells.append(f"{better / worse:.2f}" if worse else "-")
        lines.append(" | ".join(cells))
    foreign = max((record.get("foreign_cores", 0.0) for record in records), default=0.0)
    lines.append(f"\nmost work of others during a measurement: {foreign:.2f} cores")
    return "\n".join(f"| {line} |" if " | " in line else line for line in lines)


def save(name: str, records: Sequence[Record], *, servers: dict[str, Any]) -> Path:
    """Write the records with date, commit and kind of machine. Returns the path of the new file."""
    now = datetime.datetime.now(datetime.UTC)
    document = {
        "date": now.isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine(),
        "servers": servers,
        "records": list(records),
    }
    path = RESULTS / f"{now:%Y-%m-%d-%H%M%S}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def without_paths(argv: Sequence[str]) -> list[str]:
    """A command line without folders: results are shared, and a machine's folders are private."""
    return [os.path.basename(argument.rstrip("/")) if "/" in argument else argument for argument in argv]


def _spread(numbers: Sequence[float]) -> str:
    if not numbers:
        return "-"
    median, least, most = statistics.median(numbers), min(numbers), max(numbers)
    return f"{_short(median)} ({_short(least)}..{_short(most)})"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _commit() -> str:
    """The commit measured, with a mark if the tree had changes; empty outside a repository."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=RESULTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return git.stdout.strip()
