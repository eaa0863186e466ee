#!/usr/bin/env python3
"""Ask a real Prometheus every query of the Grafana dashboard and every alarm, for a server under load.

    python integrations/monitoring/dashboard_queries.py
    python integrations/monitoring/dashboard_queries.py --keep      # and keep the result in integrations/results

Starts `headwater serve` with three tiers, a Prometheus that scrapes it every second, and a load that evicts, restores,
flushes in every mode and meets a limit. After half a minute it breaks the store, and at last it ends the server. A
check of a panel passes if each of its queries has had an answer, one of an alarm if its condition has had one; two
alarms must fire. Needs Debian's package `prometheus` and takes one to two minutes. The exit code is 1 if a check
failed.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from monitoring.dashboard_load import SMALL, TIERS, DashboardLoad
from monitoring.prometheus_server import Prometheus, started
from record import record_of, save
from servers import ServerProcess

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "headwater.json"
WINDOW_S = 15  # of rates, in place of Grafana's $__rate_interval
VARIABLES = {"$__rate_interval": f"{WINDOW_S}s", "$instance": ".*", "$model": ".*"}
WHOLE_STORE_S = 30.0  # then it is broken
LOAD_LIMIT_S = 90.0  # until every query has had an answer
FIRE_LIMIT_S = 40.0
COMPARISON = re.compile(r"\s(?:==|>|<|>=)\s[\d.]+$")
STORE_ALARM, GONE_ALARM = "HeadwaterStoreFails", "HeadwaterServerGone"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel as Prometheus gets it, or the condition of an alarm without its comparison."""

    of: str
    text: str


def queries() -> list[Query]:
    """All queries of all panels, with Grafana's variables filled in."""
    found = []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            assert "$" not in text, f"a variable that Grafana fills in: {text}"
            found.append(Query(panel["title"], text))
    return found


def conditions(prometheus: Prometheus) -> list[Query]:
    """What the alarms compare. RuntimeError if Prometheus cannot evaluate one."""
    for alarm in prometheus.alarms():
        if alarm["health"] == "err":
            raise RuntimeError(f"{alarm['name']}: {alarm['lastError']}")
    return [Query(alarm["name"], COMPARISON.sub("", alarm["query"])) for alarm in prometheus.alarms()]


def ask_until_answered(prometheus: Prometheus, wanted: list[Query], *, limit_s: float) -> list[Query]:
    """Ask every second; returns the queries that never had an answer."""
    deadline_s = time.monotonic() + limit_s
    left = wanted
    while left and time.monotonic() < deadline_s:
        time.sleep(1)
        left = [query for query in left if not prometheus.ask(query.text)]
    return left


def has_fired(prometheus: Prometheus, name: str) -> bool:
    """Wait until an alarm fires."""
    deadline_s = time.monotonic() + FIRE_LIMIT_S
    while time.monotonic() < deadline_s:
        if any(alarm["name"] == name and alarm["state"] == "firing" for alarm in prometheus.alarms()):
            return True
        time.sleep(1)
    return False


def checks_of(kind: str, wanted: list[Query], unanswered: list[Query]) -> list[dict[str, Any]]:
    """One check for each panel or alarm, failed with the queries that had no answer."""
    return [
        check(f"{kind}: {name}", [f"no answer: {query.text}" for query in unanswered if query.of == name])
        for name in dict.fromkeys(query.of for query in wanted)
    ]


def check(name: str, faults: list[str]) -> dict[str, Any]:
    return {"check": name, "on": "model", "result": "failed" if faults else "passed", "reason": "; ".join(faults)}


def check_of_firing(prometheus: Prometheus, alarm: str) -> dict[str, Any]:
    return check(f"fires: {alarm}", [] if has_fired(prometheus, alarm) else ["it does not"])


def break_store(store: Path) -> None:
    """Put a file in the place of the folder. The server writes into the folder until nothing of it is left."""
    aside = store.rename(store.with_name("aside"))
    store.write_text("a file where the store's folder was")
    while aside.exists():
        shutil.rmtree(aside, ignore_errors=True)


def examine(url: str, *, folder: Path, store: Path, end_server: Callable[[], None]) -> tuple[str, list[dict[str, Any]]]:
    """Prometheus' version, and the outcome of all checks, of a server with `SMALL` and `TIERS`."""
    with started(url, folder) as prometheus:
        with DashboardLoad(url):
            panels, alarms = queries(), conditions(prometheus)
            left = ask_until_answered(prometheus, [*panels, *alarms], limit_s=WHOLE_STORE_S)
            break_store(store)
            left = ask_until_answered(prometheus, left, limit_s=LOAD_LIMIT_S)  # tokens that do not reach it
            checks = checks_of("panel", panels, left) + checks_of("alarm", alarms, left)
            checks.append(check_of_firing(prometheus, STORE_ALARM))
        end_server()
        checks.append(check_of_firing(prometheus, GONE_ALARM))
        return prometheus.version(), checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="write integrations/results/prometheus.json")
    parser.add_argument("--model", help="a folder, in place of the default model")
    args = parser.parse_args()
    if shutil.which("prometheus") is None:
        parser.error("prometheus is not installed: apt-get install prometheus")
    model = ("--model", args.model) if args.model else ()
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name), Path(name) / "store"
        command = ("-m", "headwater", "serve", *model, *SMALL, *TIERS, "--hicache-storage-dir", str(store))
        with ServerProcess(*command) as server:
            server.wait_healthy()
            version, checks = examine(server.url, folder=folder, store=store, end_server=server.process.terminate)
    record = record_of("prometheus", versions={"prometheus": version}, checks=checks)
    for each in checks:
        print(f"{each['result']}  {each['check']}  {each['reason']}".rstrip())
    print(f"{len(queries())} queries of panels; {record['passed']} checks passed, {record['failed']} failed")
    if args.keep:
        print(f"kept in {save(record).name}")
    return 1 if record["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
