#!/usr/bin/env python3
"""Run other people's clients, unchanged, against Headwater, and keep what they found.

    python integrations/run.py openai-python litellm
    python integrations/run.py --all
    HEADWATER_URL=http://127.0.0.1:30000 python integrations/run.py aiperf
    python integrations/run.py --table

Each client gets an environment of its own under HEADWATER_INTEGRATIONS_CACHE (~/.cache/headwater-integrations by
default). Without HEADWATER_URL, servers are started on free ports of 127.0.0.1 and ended afterwards. The result of
each client goes to integrations/results/NAME.json. The exit code is 1 if any check failed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from checks import PAGES, REPORT_VARIABLE, URL_VARIABLES
from clients import CLIENTS, Client, client_named
from environment import Environment, InstallError
from record import record_of, save, saved, table, update_page
from servers import ServerError, Servers
from tokenizer_folder import write_tokenizer_folder

HERE = Path(__file__).parent
# a proxy of the machine must not come between a client and 127.0.0.1, and no hub is asked for anything
FIXED = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "DO_NOT_TRACK": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(client.name for client in CLIENTS))
    parser.add_argument("--all", action="store_true", help="every client, one after another")
    parser.add_argument("--only", action="append", default=[], metavar="CHECK", help="this check; nothing is kept")
    parser.add_argument("--here", action="store_true", help="in this environment, as it is; nothing is kept")
    parser.add_argument("--table", action="store_true", help="print the table of the kept results; update its page")
    args = parser.parse_args()
    if args.table:
        print(table(saved()))
        update_page(PAGES / "index.md")
        return 0
    try:
        clients = list(CLIENTS) if args.all else [client_named(name) for name in args.names]
    except ValueError as error:
        parser.error(str(error))
    if not clients:
        parser.error("give the name of a client, or --all")
    with Servers() as servers:
        records = [run(client, servers, only=args.only, is_here=args.here) for client in clients]
    print(table(records))
    for record in records:
        for check in record["checks"]:
            if check["result"] != "passed":
                print(f"{record['client']}: {check['check']} {check['result']}: {check['reason']}")
    return 1 if any(record["failed"] for record in records) else 0


def run(client: Client, servers: Servers, *, only: list[str], is_here: bool) -> dict[str, Any]:
    """Install the client if need be, run its checks, keep the record."""
    print(f"{client.name}:", flush=True)
    environment = Environment(client, is_here=is_here)
    versions: dict[str, str] = {}
    try:
        environment.install()
        versions = environment.versions()
        checks = run_script(client, environment, variables=servers.variables(client.servers), only=only)
    except (InstallError, ServerError) as error:
        checks = [failure("start", str(error))]
    record = record_of(client.name, versions=versions, checks=checks)
    if not (only or is_here):
        save(record)
    return record


def run_script(
    client: Client, environment: Environment, *, variables: dict[str, str], only: list[str]
) -> list[dict[str, Any]]:
    """The outcomes that the script reported. A script that dies or takes too long has failed."""
    with tempfile.TemporaryDirectory(prefix="headwater-integration-") as folder:
        report = Path(folder) / "report"
        report.touch()
        if client.needs_tokenizer:
            write_tokenizer_folder(variables[URL_VARIABLES["model"]], Path(folder) / "tokenizer")
        inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        process = subprocess.Popen(
            [environment.python, HERE / client.script, *only],
            cwd=folder,
            env={
                **inherited,
                **FIXED,
                **variables,
                REPORT_VARIABLE: str(report),
                "PYTHONPATH": str(HERE),
                "HEADWATER_TOKENIZER": f"{folder}/tokenizer",
                "HEADWATER_CLIENT_FOLDER": str(environment.folder),
                "HOME": folder,  # the client's settings and caches are not the person's
                "PATH": f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}",
            },
            start_new_session=True,
        )
        reason = wait(process, client.limit_s)
        checks = [json.loads(line) for line in report.read_text().splitlines()]
    return checks if not reason else [*checks, failure("end", reason)]


def wait(process: subprocess.Popen, limit_s: float) -> str:
    """Wait for a script and end all that it has started; why it failed, or nothing."""
    began_s = time.monotonic()
    try:
        code = process.wait(limit_s)
        return f"the script ended with {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"not done in {time.monotonic() - began_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def failure(name: str, reason: str) -> dict[str, Any]:
    return {"check": name, "on": "", "result": "failed", "reason": " ".join(reason.split())[-400:], "seconds": 0.0}


if __name__ == "__main__":
    sys.exit(main())
