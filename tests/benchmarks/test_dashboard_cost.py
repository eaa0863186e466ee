"""benchmarks/dashboard: the arithmetic between the measurements and what is said of them."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path += [str(BENCHMARKS / "dashboard"), str(BENCHMARKS / "serving")]

import cost  # noqa: E402
import users  # noqa: E402
from paired import Ratio, ratio_of, t_quantile  # noqa: E402


@pytest.mark.parametrize(("degrees", "quantile"), [(5, 2.571), (11, 2.201), (30, 2.042)])
def test_the_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=0.01)


def test_a_drift_that_both_ways_share_falls_out_of_the_pairs() -> None:
    """A machine that grows slower over the minutes says nothing of the page."""
    found = ratio_of([(100 - turn, 0.98 * (100 - turn)) for turn in range(12)])
    assert found.mean == pytest.approx(0.98)
    assert found.high - found.low < 1e-9


def test_noise_widens_the_interval() -> None:
    found = ratio_of([(100, 98), (100, 102)] * 6)
    assert found.low < 0.99 < found.mean < found.high
    assert found.mean == pytest.approx(1.0, abs=0.001)


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(Ratio(0.997, 0.992, 1.002), "met"), (Ratio(0.997, 0.985, 1.009), "open"), (Ratio(0.97, 0.96, 0.98), "missed")],
)
def test_a_target_is_met_only_if_the_whole_interval_lies_above_it(ratio: Ratio, verdict: str) -> None:
    """A noisy machine could otherwise prove anything."""
    assert ratio.verdict(0.99) == verdict


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs must be at least 6"):
        ratio_of([(1.0, 1.0)] * 5)


def records(*, foreign_cores: float) -> list[dict]:
    idle = [
        {"workload": "idle", "arm": arm, "share_of_a_core": share, "foreign_cores": 0.0}
        for arm, share in (("none", 0.002), ("1 page", 0.004), ("20 pages", 0.008), ("closed", 0.002))
    ]
    loaded = [
        {"workload": "loaded", "arm": arm, "tokens_per_s": tokens, "tokens_per_cpu_s": tokens / 2, "foreign_cores": 0.0}
        | {"cpu_s": (9.0 + api) * clock, "api_cpu_s": api * clock}
        for turn, clock in enumerate((1.0, 1.3, 0.8, 1.0, 2.0, 1.1))
        for arm, tokens, api in (("none", 100 + turn, 1.0), ("page and metrics", 0.995 * (100 + turn), 1.05))
    ]
    loaded[3]["foreign_cores"] = foreign_cores
    return idle + loaded


def test_the_cost_of_one_is_a_tenth_of_that_of_ten() -> None:
    found = cost.once(Ratio(0.97, 0.94, 1.0), 10)
    assert (found.mean, found.low, found.high) == pytest.approx((0.997, 0.994, 1.0))
    assert found.verdict(0.99) == "met"


def test_a_report_names_the_cost_of_one_page() -> None:
    found = cost.report(records(foreign_cores=0.0), times=10)
    assert found["tokens_per_s_of_one"]["low"] == pytest.approx(0.9995)
    assert found["api_cpu_per_token"]["ratio"] == pytest.approx(1.0005)
    assert found["at_least_0.99"] == "met"


def test_an_answer_that_is_not_200_is_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "codes").write_text("200\n200\n")
    assert users.num_answers(tmp_path / "codes") == 2
    (tmp_path / "codes").write_text("200\n503\n")
    with pytest.raises(RuntimeError, match="503"):
        users.num_answers(tmp_path / "codes")


@pytest.mark.parametrize("foreign_cores", [0.0, 0.5])
def test_the_report_of_a_busy_machine_is_no_result(foreign_cores: float, capsys: pytest.CaptureFixture[str]) -> None:
    found = cost.report(records(foreign_cores=foreign_cores))
    assert found["tokens_per_s"]["ratio"] == pytest.approx(0.995)
    assert found["share_of_a_core"]["20 pages"] == pytest.approx(0.006)
    assert found["share_of_a_core"]["closed"] == 0
    assert found["api_cpu_per_token"]["ratio"] == pytest.approx(1.005)  # whatever the clock: 0.05 more than 10
    assert found["api_cpu_per_token"]["high"] == pytest.approx(1.005)
    assert found["is_quiet"] == (foreign_cores == 0)
    assert ("NO RESULT" in capsys.readouterr().out) == (foreign_cores > 0)
