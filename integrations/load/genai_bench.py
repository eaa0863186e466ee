"""`genai-bench benchmark`: chat streams with two clients at a time."""

import json

from checks import Server, check, run_checks
from load.tool import newest, run_block


@check("chat", limit_s=280)
def run(server: Server) -> None:
    run_block("genai-bench", 1, server, limit_s=270)
    found = json.loads(newest("D*concurrency_2*.json").read_text())["aggregated_metrics"]
    assert found["num_completed_requests"] >= 8, found
    assert found["num_error_requests"] == 0, found


if __name__ == "__main__":
    run_checks()
