"""`evalscope perf`: chat streams of a fixed length."""

import json

from checks import Server, check, run_checks
from load.tool import newest, run_block


@check("chat", limit_s=280)
def run(server: Server) -> None:
    run_block("evalscope", 1, server, limit_s=270)
    found = json.loads(newest("benchmark_summary.json").read_text())
    counts = {key: value for key, value in found.items() if "equests" in key}
    (succeeded,) = [value for key, value in counts.items() if key.lower().startswith("succe")]
    assert succeeded == 8, counts


if __name__ == "__main__":
    run_checks()
