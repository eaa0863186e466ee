"""`aiperf profile`: chat streams, and the server's metrics read meanwhile."""

import json

from checks import Server, check, run_checks
from load.tool import newest, run_block


@check("chat", limit_s=280)
def profile(server: Server) -> None:
    run_block("aiperf", 1, server, limit_s=270)
    found = json.loads(newest("profile_export_aiperf.json").read_text())
    assert found["request_count"]["avg"] == 8, found["request_count"]
    assert found["time_to_first_token"]["avg"] > 0
    assert not found.get("error_summary"), found["error_summary"]


@check("server metrics")
def metrics(server: Server) -> None:
    text = newest("server_metrics_export.json").read_text()
    assert "sglang:prompt_tokens" in text


if __name__ == "__main__":
    run_checks()
