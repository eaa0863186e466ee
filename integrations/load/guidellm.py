"""`guidellm run`: chat streams with two clients at a time."""

import json

from checks import Server, check, run_checks
from load.tool import newest, run_block


@check("chat", limit_s=280)
def run(server: Server) -> None:
    run_block("guidellm", 1, server, limit_s=270)
    (found,) = json.loads(newest("guidellm.json").read_text())["benchmarks"]
    totals = found["metrics"]["request_totals"]
    assert totals["successful"] == 8, totals
    assert totals["errored"] == 0, totals


if __name__ == "__main__":
    run_checks()
