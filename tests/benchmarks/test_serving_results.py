"""The serving benchmark's table: a ratio the wrong way round would claim the opposite of what was seen."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SERVING = Path(__file__).resolve().parents[2] / "benchmarks" / "serving"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SERVING))
    import results

    yield results
    for name in ("results", "load_client", "workloads"):  # general names, not for other tests to find
        sys.modules.pop(name, None)


def record(server: str, workload: str, **figures: float) -> dict:
    return {"server": server, "workload": workload, **figures}


def test_a_ratio_over_one_means_that_the_first_server_is_better(results: ModuleType) -> None:
    records = [
        record("ours", "W1", decode_tokens_per_s=80.0, ttft_p50_s=0.2),
        record("theirs", "W1", decode_tokens_per_s=40.0, ttft_p50_s=0.1),
    ]
    rows = {
        line.split("|")[1].strip(): line
        for line in results.table(records, ["ours", "theirs"]).splitlines()[:-1]
        if line
    }
    assert rows["W1 decode tok/s"].endswith("| 2.00 |"), "twice the rate is twice as good"
    assert rows["W1 TTFT s"].endswith("| 0.50 |"), "twice the time is half as good"


def test_a_workload_that_one_server_did_not_run_has_a_dash_and_no_ratio(results: ModuleType) -> None:
    records = [record("ours", "W2", output_tokens_per_s=10.0)]
    assert "W2 output tok/s | 10 (10..10) | - |" in results.table(records, ["ours", "theirs"])
    assert "W2 output tok/s | 10 (10..10)" in results.table(records, ["ours"])


def test_commands_are_saved_without_the_folders_of_the_machine(results: ModuleType) -> None:
    argv = ["/opt/env/bin/python", "-m", "headwater", "--model", "/data/models/tiny/", "--port", "1"]
    assert results.without_paths(argv) == ["python", "-m", "headwater", "--model", "tiny", "--port", "1"]
