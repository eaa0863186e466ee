"""Percentiles, goals, arrivals and figures: without a network, a clock or a server."""

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.bench.apis import Told
from headwater.bench.arrivals import due_s, faster, from_zero, sessions_of
from headwater.bench.exchange import Exchange
from headwater.bench.percentile import Distribution, percentile
from headwater.bench.report import in_flight
from headwater.bench.slo import Slo
from headwater.bench.statistics import figures_of
from headwater.planning.synthetic import SyntheticWorkload
from headwater.planning.trace import PlannedRequest


def exchange(
    *, at: float = 0.0, ttft: float = 0.1, gaps: tuple[float, ...] = (0.02, 0.02), error: str = "", late: float = 0.0
) -> Exchange:
    num = len(gaps) + 1
    last = at + ttft + sum(gaps)
    return Exchange(
        due_s=at,
        sent_s=at + late,
        ended_s=last + 0.01,
        first_s=at + ttft,
        last_s=last,
        gaps_s=array("d", gaps),
        num_events=num,
        told=Told(num_prompt_tokens=100, num_cached_tokens=40, num_output_tokens=num),
        error=error,
    )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


def test_nothing_observed_is_zero_and_not_an_error() -> None:
    assert Distribution.of([]).count == 0
    assert Distribution.of([3.0, 1.0]).p50 == 2.0


def test_latencies_count_from_the_moment_a_request_was_due() -> None:
    """From the sending instead, a generator that falls behind would report a fast server (coordinated omission)."""
    late = exchange(ttft=0.5, late=0.4)
    assert late.ttft_s == pytest.approx(0.5)
    assert figures_of([late]).late_s.max == pytest.approx(0.4)


def test_the_figures_of_a_round() -> None:
    found = figures_of([exchange(at=10.0), exchange(at=11.0, gaps=(0.1,)), exchange(at=12.0, error="broke")])
    assert (found.num_requests, found.num_failed) == (3, 1)
    assert found.duration_s == pytest.approx(12.0 + 0.1 + 0.04 + 0.01 - 10.0)
    assert found.num_output_tokens == 5, "a failed request's tokens do not count"
    assert found.output_tokens_per_s == pytest.approx(5 / found.duration_s)
    assert found.cached_share == pytest.approx(0.4)
    assert (found.itl_s.count, found.itl_s.max) == (3, pytest.approx(0.1))
    assert found.tpot_s.p50 == pytest.approx((0.02 + 0.1) / 2)
    assert found.errors == {"broke": 1}
    assert found.goodput_per_s is None


def test_goodput_counts_requests_that_meet_every_goal() -> None:
    slo = Slo.parse("ttft=200, itl=50")
    assert slo.is_met(exchange())
    assert not slo.is_met(exchange(ttft=0.3))
    assert not slo.is_met(exchange(gaps=(0.02, 0.2)))
    assert not slo.is_met(exchange(error="broke")), "no answer is no good answer"
    found = figures_of([exchange(), exchange(ttft=0.3), exchange(error="broke")], slo=slo)
    assert found.num_good == 1
    assert found.goodput_per_s == pytest.approx(1 / found.duration_s)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ttf=3", "'ttf' is not one of ttft, itl, tpot, e2e"),
        ("ttft=fast", "ttft needs milliseconds above 0, found 'fast'"),
        ("ttft=0", "above 0"),
        ("ttft=nan", "above 0"),
        ("ttft=1,ttft=2", "given twice"),
        ("", "is not one of"),
    ],
)
def test_a_wrong_goal_is_a_sentence(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Slo.parse(text)


def request(arrival_s: float, session: str = "", **more: float) -> PlannedRequest:
    return PlannedRequest(arrival_s=arrival_s, num_output_tokens=1, new_tokens=1, session=session, **more)  # type: ignore[arg-type]


def test_requests_of_one_session_follow_one_another() -> None:
    trace = [request(5.0, "b"), request(2.0), request(7.0, "b", think_s=3.0)]
    alone, chat = from_zero(sessions_of(trace))
    assert [turn.number for turn in alone.turns] == [1]
    assert (alone.begins_s, chat.begins_s) == (0.0, 3.0)
    assert [turn.number for turn in chat.turns] == [0, 2]
    assert due_s(chat, 1, previous_ended_s=0.5) == 5.0, "not before it arrives"
    assert due_s(chat, 1, previous_ended_s=4.0) == 7.0, "nor before the pause after the answer"


def test_a_trace_can_be_played_faster() -> None:
    (quick,) = faster([request(8.0, "a", think_s=2.0)], 4.0)
    assert (quick.arrival_s, quick.think_s) == (2.0, 0.5)
    with pytest.raises(ValueError, match="above 0"):
        faster([], 0.0)


def test_poisson_arrivals_have_their_rate_and_their_spread() -> None:
    """Of an exponential distribution, mean and standard deviation are the same. Even gaps would have none."""
    trace = SyntheticWorkload(num_requests=4000, requests_per_s=50.0, turns_per_session=1, prefix_tokens=0).requests()
    gaps = np.diff([session.begins_s for session in sessions_of(trace)])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.08)


def test_exact_lengths() -> None:
    trace = SyntheticWorkload(num_requests=5, user_tokens=30, output_tokens=9, has_exact_lengths=True).requests()
    assert {(each.new_tokens, each.num_output_tokens) for each in trace} == {(30, 9)}


def test_requests_in_flight_over_the_round() -> None:
    points = in_flight([exchange(at=0.0, gaps=(0.9,)), exchange(at=0.5, gaps=(0.9,))])
    assert points[0][1] == 1
    assert max(count for _, count in points) == 2
    assert points[-1][1] == 0
