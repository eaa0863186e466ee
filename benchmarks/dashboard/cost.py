"""What the operating page and the metrics cost: throughput under load with and without them, and an idle server's time.

    python benchmarks/dashboard/cost.py --save         # 7 to 8 minutes, on a quiet machine

- **Under load**: streams run all the time. In windows by turns (A B B A ...) the server is left alone, or one page is
  open and `/metrics` is scraped every 5 seconds, twice as often as deploy/prometheus does. The figure is the ratio of
  tokens a second, by pairs of neighbouring windows, with a 95 % interval. The target of 0.99 is met only if the whole
  interval lies above it. A quiet machine's speed still varies by some per cent from window to window. So a
  second figure is the processor time that the API process takes more for a token, as a share of what all processes
  take. What varies is then a small part of the whole. The engine's report, one a second, is not in this figure.
- **Idle**: processor time of the server's processes with no page, one, 20, and after 20 were closed.

The server counts the tokens and gives the time of its count, so no request's end falls on a window's edge. The pages
are curl processes: on a machine with few cores, a client that parses them would be measured as well. Work of other
processes is recorded; figures of a machine that was not quiet are no result.
"""

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))
from paired import Ratio, ratio_of

from headwater.bench.machine import ForeignLoad, cpu_s, process_tree
from results import save
from server_process import ServerProcess

COMMAND = "-m headwater serve --port {port} --enable-hierarchical-cache --max-total-tokens 60000"
NUM_PREFIXES = 300  # in the tree
SETTLE_S = 10.0  # the server prepares grammars, and copies pages to the host
OPEN_S = 1.5  # the first, whole snapshots of pages are no running cost
NUM_STREAMS = 4
NUM_TOKENS = 64  # of each answer under load
QUIET_CORES = 0.1  # of others, in any window
IDLE_ARMS = ("none", "1 page", "20 pages", "closed")
NUM_PAGES = {"1 page": 1, "20 pages": 20, "page and metrics": 1}
TARGETS = {"tokens_per_s": 0.99, "share_of_a_core_20_pages": 0.02}
Record = dict[str, Any]


class Load:
    """Streams in a closed loop, for as long as the context lasts."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._stream, args=(index,)) for index in range(NUM_STREAMS)]

    def _stream(self, index: int) -> None:
        sampling = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0}
        turn = 0
        while not self._is_over.is_set():
            turn += 1
            body = {
                "input_ids": ids_of(index, turn, num_tokens=24),
                "sampling_params": sampling,
                "no_store": True,
                "stream": True,
            }
            with httpx.stream("POST", f"{self._url}/generate", json=body, timeout=60, trust_env=False) as answer:
                for _ in answer.iter_raw():
                    pass

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()


def ids_of(*numbers: int, num_tokens: int) -> list[int]:
    """Token ids that any vocabulary has, others for other numbers."""
    seed = sum((number + 1) * factor for number, factor in zip(numbers, (7919, 104_729), strict=False))
    return [3 + (seed * (place + 1) + place * place) % 180 for place in range(num_tokens)]


@contextlib.contextmanager
def pages(url: str, count: int, folder: Path) -> Iterator[list[tuple[int, Path]]]:
    """`count` open pages: the process of each, and the file that grows with what it gets."""
    files = [folder / f"page-{index}" for index in range(count)]
    command = ["curl", "-sN", "--noproxy", "*", f"{url}/dashboard/events", "-o"]
    processes = [subprocess.Popen([*command, str(file)]) for file in files]
    try:
        time.sleep(OPEN_S)
        yield [(process.pid, file) for process, file in zip(processes, files, strict=True)]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(10)


@contextlib.contextmanager
def scrapes(url: str, *, every_s: float) -> Iterator[None]:
    """What Prometheus does; once at the beginning, then every `every_s` seconds."""
    is_over = threading.Event()

    def scrape() -> None:
        with httpx.Client(trust_env=False, timeout=30) as http:
            while not is_over.is_set():
                http.get(f"{url}/metrics").raise_for_status()
                is_over.wait(every_s)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def fill(url: str) -> None:
    """Prompts with common beginnings, of several tenants."""

    def one(index: int) -> None:
        ids = [*ids_of(index % 12, num_tokens=64), *ids_of(index, index % 7, num_tokens=32)]
        body = {"input_ids": ids, "cache_salt": f"t{index % 5}", "sampling_params": {"max_new_tokens": 1}}
        httpx.post(f"{url}/generate", json=body, timeout=60, trust_env=False).raise_for_status()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(NUM_PREFIXES)))


def window(
    server: ServerProcess, workload: str, arm: str, *, seconds: float, folder: Path, scrape_every_s: float = 5.0
) -> Record:
    """One measurement: tokens a second, processor time, bytes of a page, and the work of others."""
    url, count = server.target.url, NUM_PAGES.get(arm, 0)
    watched = scrapes(url, every_s=scrape_every_s) if arm == "page and metrics" else contextlib.nullcontext()
    with pages(url, count, folder) as opened, watched:
        tree = process_tree(server.pid)
        others = ForeignLoad([*tree, *(pid for pid, _ in opened)])
        before, size = edge(url, server.pid, tree), sum(file.stat().st_size for _, file in opened)
        time.sleep(seconds)
        after, grown = edge(url, server.pid, tree), sum(file.stat().st_size for _, file in opened) - size
        foreign = others.cores()
    wall_s, used_s, api_s, tokens = (after[name] - before[name] for name in ("time_s", "cpu_s", "api_cpu_s", "tokens"))
    record = {"workload": workload, "arm": arm, "share_of_a_core": used_s / wall_s, "foreign_cores": foreign}
    if count:
        record["bytes_per_s_of_a_page"] = grown / wall_s / count
    if workload == "loaded":
        record |= {"tokens_per_s": tokens / wall_s, "tokens_per_cpu_s": tokens / used_s, "api_cpu_s": api_s}
        record |= {"cpu_s": used_s, "tokens": tokens}
    print({name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()}, flush=True)
    return record


def edge(url: str, api: int, tree: list[int]) -> dict[str, float]:
    """Tokens since the start as the server counts them, when it counted, and its processes' processor time."""
    sample = httpx.get(f"{url}/dashboard/snapshot", timeout=30, trust_env=False).raise_for_status().json()["sample"]
    used_s = sum(cpu_s(pid) for pid in tree)
    return {
        "tokens": sample["generated_tokens"],
        "time_s": sample["t"] / 1000,
        "cpu_s": used_s,
        "api_cpu_s": cpu_s(api),
    }


def measure(server: ServerProcess, args: argparse.Namespace, *, folder: Path) -> list[Record]:
    records = []
    time.sleep(SETTLE_S)
    for _ in range(args.idle_rounds):
        records += [window(server, "idle", arm, seconds=args.idle_seconds, folder=folder) for arm in IDLE_ARMS]
    with Load(server.target.url):
        time.sleep(2)
        for turn in range(args.pairs):
            arms = ("none", "page and metrics")
            for arm in arms if turn % 2 == 0 else reversed(arms):
                records.append(
                    window(
                        server,
                        "loaded",
                        arm,
                        seconds=args.seconds,
                        folder=folder,
                        scrape_every_s=args.scrape_every,
                    )
                )
    return records


def ratio(records: list[Record], name: str) -> Ratio:
    """With over without, of each pair of loaded windows."""
    found = {
        arm: [r[name] for r in records if (r["workload"], r["arm"]) == ("loaded", arm)]
        for arm in ("none", "page and metrics")
    }
    return ratio_of(list(zip(*found.values(), strict=True)))


def api_cost(records: list[Record]) -> Ratio:
    """1 + what the API process takes more for a token with a page and metrics, over what all processes take for it.

    From the API process's shares of the processor time, a without and b with them: the clock's speed cancels out.
    """
    without, watched = (
        [r for r in records if (r["workload"], r["arm"]) == ("loaded", arm)] for arm in ("none", "page and metrics")
    )
    api = [(a["api_cpu_s"] / a["cpu_s"], b["api_cpu_s"] / b["cpu_s"]) for a, b in zip(without, watched, strict=True)]
    return ratio_of([(1.0, 1.0 + (b - a) / (1.0 - b)) for a, b in api])


def idle_cost(records: list[Record], arm: str) -> float:
    """The mean share of a core that an idle server takes more than without pages, round by round."""
    by_arm = {each: [r["share_of_a_core"] for r in records if (r["workload"], r["arm"]) == ("idle", each)]
              for each in (arm, "none")}  # fmt: skip
    return sum(by_arm[arm]) / len(by_arm[arm]) - sum(by_arm["none"]) / len(by_arm["none"])


def report(records: list[Record]) -> Record:
    """Prints the figures and what they say of the targets; returns them for the record."""
    found: Record = {}
    for name in ("tokens_per_s", "tokens_per_cpu_s"):
        value = ratio(records, name)
        found[name] = {"ratio": value.mean, "low": value.low, "high": value.high}
        print(f"{name} with a page and metrics, over without: {value}")
    api = api_cost(records)
    found["api_cpu_per_token"] = {"ratio": api.mean, "low": api.low, "high": api.high}
    print(f"processor time of a token if only the API process takes more, over without: {api}")
    verdict = ratio(records, "tokens_per_s").verdict(TARGETS["tokens_per_s"])
    shares = {arm: idle_cost(records, arm) for arm in IDLE_ARMS[1:]}
    found |= {"share_of_a_core": shares, "at_least_0.99": verdict}
    for arm, share in shares.items():
        print(f"idle, {arm}: {100 * share:+.2f} % of a core")
    busiest = max(record["foreign_cores"] or 0.0 for record in records)
    found["is_quiet"] = busiest <= QUIET_CORES
    print(f"at least {TARGETS['tokens_per_s']} of the tokens a second: {verdict}")
    is_cheap = shares["20 pages"] < TARGETS["share_of_a_core_20_pages"]
    print(f"20 idle pages under 2 % of a core: {'met' if is_cheap else 'missed'}")
    if not found["is_quiet"]:
        print(f"NO RESULT: others used up to {busiest:.2f} cores; repeat it on a quiet machine")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window under load")
    parser.add_argument("--pairs", type=int, default=12, help="of windows under load, at least 6")
    parser.add_argument("--scrape-every", type=float, default=5.0, help="seconds between scrapes of /metrics")
    parser.add_argument("--idle-seconds", type=float, default=8.0, help="of each idle window")
    parser.add_argument("--idle-rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write a record to benchmarks/results")
    args = parser.parse_args()
    if args.pairs < 6 or args.idle_rounds < 1 or min(args.seconds, args.idle_seconds, args.scrape_every) <= 0:
        parser.error("--pairs must be at least 6, --idle-rounds at least 1, and the seconds positive")
    if shutil.which("curl") is None:
        parser.error("curl is not installed")
    command = f"{sys.executable} {COMMAND}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = ServerProcess(command, environment={}, model="default", extra={}, log=folder / "log")
        try:
            server.wait_until_answering(120)
            fill(server.target.url)
            records = measure(server, args, folder=folder)
        finally:
            server.stop()
    found = report(records)
    if args.save:
        named = [record | {"server": "headwater"} for record in records]
        print(save("dashboard-cost", [*named, found], servers={"headwater": {"command": ["python", *server.argv[1:]]}}))


if __name__ == "__main__":
    main()
