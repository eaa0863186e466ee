"""What is sampled from a server during a long run, and the judgement whether it stays flat."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from headwater.bench.machine import children_of, rss_mib

PAGE_OWNERS = ("free", "cached", "private", "retired", "transfer")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Process:
    """Memory and open files of one process, by the kernel's account."""

    rss_mib: float
    num_files: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment, `at_s` after the load began."""

    at_s: float
    api: Process
    engine: Process
    pages: dict[str, int]  # of the device, by owner, and `capacity`
    num_requests: int  # answered so far

    @property
    def is_accounted(self) -> bool:
        """Whether every page has exactly one owner."""
        return sum(self.pages[owner] for owner in PAGE_OWNERS) == self.pages["capacity"]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Trend:
    """A straight line through a series: its value in the middle, and how much it grew from begin to end."""

    name: str
    mean: float
    growth: float
    limit: float  # of the growth

    @property
    def is_flat(self) -> bool:
        return self.growth <= self.limit


def process_at(pid: int) -> Process:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Process(
        rss_mib=round(int(status["VmRSS"].split()[0]) / 1024, 2),
        num_files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        num_threads=int(status["Threads"]),
    )


def mappings_mib(pid: int) -> dict[str, float]:
    """Memory in use by mapping: a file's name, or the address of memory without one."""
    found: dict[str, float] = {}
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            name = fields[5] if len(fields) > 5 else fields[0].partition("-")[0]
        elif fields[0] == "Rss:":
            found[name] = found.get(name, 0.0) + int(fields[1]) / 1024
    return found


def grown(before: dict[str, float], after: dict[str, float], *, least_mib: float = 0.5) -> dict[str, float]:
    """Which mappings hold more memory than before, in MiB."""
    more = {name: round(mib - before.get(name, 0.0), 2) for name, mib in after.items()}
    return {name: mib for name, mib in more.items() if mib >= least_mib}


def engine_of(api: int) -> int:
    """The engine's process: the largest child of the API process, whose other child only cleans up."""
    return max(children_of(api), key=rss_mib)


async def device_pages(http: httpx.AsyncClient) -> dict[str, int]:
    device = (await http.get("/cache")).raise_for_status().json()["tiers"]["device"]
    return {owner: device[f"{owner}_pages"] for owner in (*PAGE_OWNERS, "capacity")}


def trend(name: str, at_s: Sequence[float], values: Sequence[float], *, share: float, least: float) -> Trend:
    """The growth by least squares. It may be `share` of the mean, or `least` in the series' own unit."""
    slope, _ = np.polyfit(at_s, values, 1)
    mean = float(np.mean(values))
    growth = float(slope) * (at_s[-1] - at_s[0])
    return Trend(name, mean=round(mean, 2), growth=round(growth, 3), limit=round(max(share * mean, least), 2))


def trends(samples: Sequence[Sample]) -> list[Trend]:
    """Memory may grow by 2 % over the whole run, files and threads by two, all else not at all."""
    at_s = [sample.at_s for sample in samples]
    found = []
    for which in ("api", "engine"):
        processes: list[Process] = [getattr(sample, which) for sample in samples]
        found += [
            trend(f"{which} RSS, MiB", at_s, [one.rss_mib for one in processes], share=0.02, least=2.0),
            trend(f"{which} open files", at_s, [one.num_files for one in processes], share=0.0, least=2.0),
            trend(f"{which} threads", at_s, [one.num_threads for one in processes], share=0.0, least=2.0),
        ]
    used = [sample.pages["private"] + sample.pages["retired"] + sample.pages["transfer"] for sample in samples]
    found.append(trend("pages of requests", at_s, used, share=0.1, least=samples[0].pages["capacity"] * 0.05))
    return found
