"""`sglang.benchmark.serving`: the native API, chat, and shared prefixes behind a flush."""

import json
from pathlib import Path

from checks import Server, check, run_checks
from load.tool import STAND_INS, run_block

PAGE = "sglang-bench"


def result(name: str) -> dict:
    return json.loads(Path(name).read_text().splitlines()[-1])


@check("native", limit_s=240)
def native(server: Server) -> None:
    run_block(PAGE, 1, server, limit_s=230, python_path=STAND_INS)
    found = result("native.jsonl")
    assert found["completed"] == 8
    assert found["total_output_tokens"] == 8 * 16


@check("chat", limit_s=240)
def chat(server: Server) -> None:
    run_block(PAGE, 2, server, limit_s=230, python_path=STAND_INS)
    assert result("chat.jsonl")["completed"] == 8


@check("shared prefix", limit_s=240)
def shared_prefix(server: Server) -> None:
    """It flushes first, then every prompt but the first of a group finds its prefix in the cache."""
    output = run_block(PAGE, 3, server, limit_s=230, python_path=STAND_INS)
    assert result("shared.jsonl")["completed"] == 8
    assert "flush" in output.lower()


if __name__ == "__main__":
    run_checks()
