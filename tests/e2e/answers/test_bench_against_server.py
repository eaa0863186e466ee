"""`headwater bench` against real processes: what it says was cold is cold, and its counts are the server's."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from running_server import RunningServer

from headwater.cli.main import app

pytestmark = pytest.mark.slow
WORKLOAD = ("--requests", "6", "--concurrency", "3", "--user-tokens", "80", "--output-tokens", "5", "--warm-up", "2")


def bench(server: RunningServer, record: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rounds of a run, from its record."""
    command = ["bench", "--url", server.url, *WORKLOAD, "--json", str(record), *arguments]
    done = CliRunner().invoke(app, command, env={"NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    return json.loads(record.read_text())["rounds"]


def test_rounds_are_cold_after_a_flush_and_warm_without_one(tiny_model: str, tmp_path: Path) -> None:
    """Also the second round of the same texts: a flush that left the host warm would show as cached tokens."""
    record = tmp_path / "r.json"
    options = ("--enable-hierarchical-cache", "--max-total-tokens", "4000", "--hicache-ratio", "1")
    with RunningServer("--model", tiny_model, "--served-model-name", "tiny", *options) as server:
        server.wait_healthy()
        before = _generated(server)
        cold = bench(server, record, "--api", "completions", "--rounds", "2", "--repeat-prompts")
        assert [each["flush"]["words"] for each in cold] == ["cold: device, host"] * 2
        assert [each["figures"]["num_cached_tokens"] for each in cold] == [0, 0]
        assert _generated(server) - before == 2 * 30 + 2 * 5 + 2, "two rounds, the warm-up, and two single tokens"
        for request in cold[0]["requests"]:
            assert request["num_output_tokens"] == 5
            assert 64 <= request["num_prompt_tokens"] <= 96, "80 were asked for, in words"
        warm = bench(server, record, "--api", "generate", "--prompts", "ids", "--vocab-size", "210", "--rounds", "2",
                     "--repeat-prompts", "--flush", "none")  # fmt: skip
        first, second = (each["figures"] for each in warm)
        assert first["num_prompt_tokens"] == second["num_prompt_tokens"] == 6 * 80
        assert second["num_cached_tokens"] >= 6 * 64
        talk = bench(server, record, "--api", "generate", "--session-turns", "3", "--user-tokens", "30")
        assert talk[0]["figures"]["num_cached_tokens"] > 0, "later turns find the earlier ones"


def _generated(server: RunningServer) -> float:
    found = re.search(r"^sglang:generation_tokens_total\{.*\} (\S+)$", server.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0  # before the first request
