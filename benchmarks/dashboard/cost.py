"""What the operating page and the metrics cost: throughput under load with and without them, and an idle server's time.

    python benchmarks/dashboard/cost.py --save         # 7 to 8 minutes, on a quiet machine

- **Under load**: streams run all the time. In windows by turns (A B B A ...) the server is left alone, or a page is
  open and `/metrics` is scraped. A page gets a report a second. Scrapes are 5 seconds apart, half of what
  deploy/prometheus sets. A quiet machine's speed varies by some per cent from window to window, which hides a cost of
  one per cent. So both happen `--times` as often (10), and what the ratio of tokens a second lacks to 1 is divided by
  that. The ratio is of neighbouring windows, with a 95 % interval. The target of 0.99 is met only if the whole interval
  lies above it. A second figure is the processor time that the API process takes more for a token, as a share of what
  all processes take, divided alike. The engine's part of the reports is not in it.
- **Idle**: processor time of the server's processes with no page, one, 20, and after 20 were closed.

The server counts the tokens and gives the time of its count, so no request's end falls on a window's edge. The pages
are curl processes: on a machine with few cores, a client that parses them would be measured as well. Work of other
processes is recorded; figures of a machine that was not quiet are no result.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.append(str(Path(__file__).resolve().parents[1] / "serving"))
from paired import Ratio, ratio_of
from users import Load, fill, num_answers, pages, scrapes

from headwater.bench.machine import ForeignLoad, cpu_s, process_tree
from results import save
from server_process import ServerProcess

SERVE = f"{sys.executable} -m headwater serve --port {{port}} --enable-hierarchical-cache --max-total-tokens 60000"
OFTEN = Path(__file__).resolve().with_name("often.py")
ROOT = OFTEN.parents[2]
SETTLE_S = 10.0  # the server prepares grammars, and copies pages to the host
QUIET_CORES = 0.1  # of others, in any window
IDLE_ARMS = ("none", "1 page", "20 pages", "closed")
WATCHED = "page and metrics"
NUM_PAGES = {"1 page": 1, "20 pages": 20, WATCHED: 1}
TARGETS = {"tokens_per_s": 0.99, "share_of_a_core_20_pages": 0.02}
Record = dict[str, Any]


def window(
    server: ServerProcess, workload: str, arm: str, *, seconds: float, folder: Path, times: int = 1,
    scrape_every_s: float = 5.0,
) -> Record:  # fmt: skip
    """One measurement: tokens a second, processor time, bytes of a page, and the work of others."""
    url, count = server.target.url, NUM_PAGES.get(arm, 0)
    is_watched, codes = arm == WATCHED, folder / "codes"
    scraped = scrapes(url, per_s=times / scrape_every_s, codes=codes) if is_watched else contextlib.nullcontext()
    with pages(url, count, folder) as opened, scraped:
        tree = process_tree(server.pid)
        others = ForeignLoad([*tree, *process_tree(os.getpid())])
        begun = num_answers(codes) if is_watched else 0
        before, texts = edge(url, server.pid, tree), [file.read_bytes() for _, file in opened]
        time.sleep(seconds)
        after = edge(url, server.pid, tree)
        texts = [file.read_bytes()[len(text) :] for text, (_, file) in zip(texts, opened, strict=True)]
        num_scrapes = num_answers(codes) - begun if is_watched else 0
        foreign = others.cores()
    wall_s, used_s, api_s, tokens = (after[name] - before[name] for name in ("time_s", "cpu_s", "api_cpu_s", "tokens"))
    record = {"workload": workload, "arm": arm, "share_of_a_core": used_s / wall_s, "foreign_cores": foreign}
    if count:
        record["bytes_per_s_of_a_page"] = sum(map(len, texts)) / wall_s / count
        record["events_per_s_of_a_page"] = sum(text.count(b"event: ") for text in texts) / wall_s / count
    if workload == "loaded":
        record |= {"tokens_per_s": tokens / wall_s, "tokens_per_cpu_s": tokens / used_s, "api_cpu_s": api_s}
        record |= {"cpu_s": used_s, "tokens": tokens}
    if is_watched:
        record["scrapes_per_s"] = num_scrapes / wall_s
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


def measure_idle(server: ServerProcess, args: argparse.Namespace, *, folder: Path) -> list[Record]:
    return [
        window(server, "idle", arm, seconds=args.idle_seconds, folder=folder)
        for _ in range(args.idle_rounds)
        for arm in IDLE_ARMS
    ]


def measure_loaded(server: ServerProcess, args: argparse.Namespace, *, folder: Path) -> list[Record]:
    records = []
    with Load(server.target.url):
        time.sleep(2)
        for turn in range(args.pairs):
            arms = ("none", WATCHED)
            for arm in arms if turn % 2 == 0 else reversed(arms):
                records.append(window(
                    server, "loaded", arm, seconds=args.seconds, folder=folder, times=args.times,
                    scrape_every_s=args.scrape_every,
                ))  # fmt: skip
    return records


def ratio(records: list[Record], name: str) -> Ratio:
    """With over without, of each pair of loaded windows."""
    found = {
        arm: [r[name] for r in records if (r["workload"], r["arm"]) == ("loaded", arm)] for arm in ("none", WATCHED)
    }
    return ratio_of(list(zip(*found.values(), strict=True)))


def api_cost(records: list[Record]) -> Ratio:
    """1 + what the API process takes more for a token with a page and metrics, over what all processes take for it.

    From the API process's shares of the processor time, a without and b with them: the clock's speed cancels out.
    """
    without, watched = (
        [r for r in records if (r["workload"], r["arm"]) == ("loaded", arm)] for arm in ("none", WATCHED)
    )
    api = [(a["api_cpu_s"] / a["cpu_s"], b["api_cpu_s"] / b["cpu_s"]) for a, b in zip(without, watched, strict=True)]
    return ratio_of([(1.0, 1.0 + (b - a) / (1.0 - b)) for a, b in api])


def idle_cost(records: list[Record], arm: str) -> float:
    """The mean share of a core that an idle server takes more than without pages, round by round."""
    by_arm = {each: [r["share_of_a_core"] for r in records if (r["workload"], r["arm"]) == ("idle", each)]
              for each in (arm, "none")}  # fmt: skip
    return sum(by_arm[arm]) / len(by_arm[arm]) - sum(by_arm["none"]) / len(by_arm["none"])


def once(value: Ratio, times: int) -> Ratio:
    """What one page and its scrapes cost, of the ratio at `times` as many."""
    return Ratio(*(1.0 - (1.0 - bound) / times for bound in (value.mean, value.low, value.high)))


def report(records: list[Record], *, times: int = 1) -> Record:
    """Prints the figures and what they say of the targets; returns them for the record."""
    found: Record = {"times": times}
    for name in ("tokens_per_s", "tokens_per_cpu_s"):
        value = ratio(records, name)
        found[name] = {"ratio": value.mean, "low": value.low, "high": value.high}
        print(f"{name} with {times} times a page's reports and scrapes, over without: {value}")
    one = once(ratio(records, "tokens_per_s"), times)
    found["tokens_per_s_of_one"] = {"ratio": one.mean, "low": one.low, "high": one.high}
    print(f"so tokens_per_s with a page and metrics, over without: {one}")
    api = once(api_cost(records), times)
    found["api_cpu_per_token"] = {"ratio": api.mean, "low": api.low, "high": api.high}
    print(f"processor time of a token with them if only the API process takes more, over without: {api}")
    verdict = one.verdict(TARGETS["tokens_per_s"])
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
    parser.add_argument("--times", type=int, default=10, help="reports and scrapes under load, of those in use")
    parser.add_argument("--scrape-every", type=float, default=5.0, help="seconds between scrapes of /metrics")
    parser.add_argument("--idle-seconds", type=float, default=8.0, help="of each idle window")
    parser.add_argument("--idle-rounds", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write a record to benchmarks/results")
    args = parser.parse_args()
    if (
        args.pairs < 6
        or min(args.idle_rounds, args.times) < 1
        or min(args.seconds, args.idle_seconds, args.scrape_every) <= 0
    ):
        parser.error("--pairs must be at least 6, --idle-rounds and --times at least 1, and the seconds positive")
    if shutil.which("curl") is None:
        parser.error("curl is not installed")
    often = SERVE.replace("-m headwater", f"{OFTEN} {1 / args.times}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = []
        for command, measure in ((SERVE, measure_idle), (often, measure_loaded)):
            server = ServerProcess(command, environment={}, model="default", extra={}, log=folder / "log")
            try:
                server.wait_until_answering(120)
                fill(server.target.url)
                time.sleep(SETTLE_S)
                records += measure(server, args, folder=folder)
            finally:
                server.stop()
    found = report(records, times=args.times)
    if args.save:
        named = [record | {"server": "headwater"} for record in records]
        command = ["python", str(OFTEN.relative_to(ROOT)), *server.argv[2:]]
        print(save("dashboard-cost", [*named, found], servers={"headwater": {"command": command}}))


if __name__ == "__main__":
    main()
