"""The circuit breaker: it must open when a store fails, and above all close again."""

import logging

import pytest

from headwater.clock import ManualClock
from headwater.storage.guard import BreakerState, CircuitBreaker

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def breaker(clock) -> CircuitBreaker:
    return CircuitBreaker(clock, failure_threshold=3, slow_call_s=2.0, open_s=1.0, max_open_s=4.0)


def fail(breaker, times=1, cause="timeout"):
    for _ in range(times):
        breaker.failed(breaker.try_enter(), cause=cause)


def test_failures_in_a_row_open_it(breaker):
    fail(breaker, 2)
    assert breaker.state is CLOSED
    fail(breaker)
    assert breaker.state is OPEN
    assert breaker.try_enter() is None


def test_a_success_between_failures_keeps_it_closed(breaker):
    for _ in range(5):
        fail(breaker, 2)
        breaker.succeeded(breaker.try_enter())
    assert breaker.state is CLOSED


def test_calls_that_succeed_too_late_open_it(breaker, clock):
    """A store that answers after ten seconds is as bad as one that does not."""
    for _ in range(3):
        permit = breaker.try_enter()
        clock.advance(2.5)
        breaker.succeeded(permit)
    assert breaker.state is OPEN
    assert breaker.counters()["failed_slow"] == 3


def test_one_probe_passes_and_closes_it(breaker, clock):
    fail(breaker, 3)
    clock.advance(0.9)
    assert breaker.try_enter() is None
    clock.advance(0.1)
    assert breaker.state is HALF_OPEN
    probe = breaker.try_enter()
    assert probe.is_probe
    assert breaker.try_enter() is None, "a store that may be down must not get a crowd"
    breaker.succeeded(probe)
    assert breaker.state is CLOSED
    assert breaker.try_enter() is not None


def test_failed_probes_double_the_pause_up_to_its_limit(breaker, clock):
    fail(breaker, 3)
    for pause_s in (1.0, 2.0, 4.0, 4.0):
        clock.advance(pause_s - 0.01)
        assert breaker.try_enter() is None
        clock.advance(0.02)
        breaker.failed(breaker.try_enter(), cause="unavailable")
        assert breaker.state is OPEN
    clock.advance(5)
    breaker.succeeded(breaker.try_enter())
    fail(breaker, 3)
    clock.advance(1.0)
    assert breaker.state is HALF_OPEN, "after a recovery the pause is the first one again"


def test_calls_of_an_earlier_state_decide_nothing(breaker, clock):
    """A hanging call that succeeds at last must not close a breaker that opened meanwhile, nor fail a new one."""
    old = [breaker.try_enter() for _ in range(4)]
    fail(breaker, 3)
    breaker.succeeded(old[0])
    assert breaker.state is OPEN
    clock.advance(1.0)
    probe = breaker.try_enter()
    breaker.succeeded(old[1])
    breaker.failed(old[2], cause="timeout")
    assert breaker.state is HALF_OPEN
    breaker.succeeded(probe)
    breaker.failed(old[3], cause="timeout")
    assert breaker.state is CLOSED


def test_an_old_success_does_not_excuse_new_failures(breaker, clock):
    old = breaker.try_enter()
    fail(breaker, 3)
    clock.advance(1.0)
    breaker.succeeded(breaker.try_enter())
    fail(breaker, 2)
    breaker.succeeded(old)
    fail(breaker, 1)
    assert breaker.state is OPEN


def test_the_log_says_once_that_the_store_fails_and_once_that_it_answers_again(breaker, clock, caplog):
    """A store that was removed showed in the metrics only; the log of a night had nothing about it."""
    caplog.set_level(logging.WARNING, logger="headwater.storage.guard")
    fail(breaker, 2)
    breaker.failed(breaker.try_enter(), cause="unavailable", details="/data/pages must be a folder")
    for _ in range(3):
        clock.advance(4.0)
        fail(breaker)
    assert caplog.messages == [
        "the store fails (unavailable: /data/pages must be a folder): requests are served without it until a probe "
        "succeeds"
    ]
    clock.advance(4.0)
    breaker.succeeded(breaker.try_enter())
    assert caplog.messages[1:] == ["the store answers again: its pages are read and written"]


def test_counters_name_the_causes(breaker, clock):
    breaker.succeeded(breaker.try_enter())
    fail(breaker, 2, cause="timeout")
    fail(breaker, 1, cause="unavailable")
    assert breaker.try_enter() is None
    clock.advance(1.0)
    breaker.succeeded(breaker.try_enter())
    assert breaker.counters() == {
        "succeeded": 2,
        "failed": 3,
        "failed_timeout": 2,
        "failed_unavailable": 1,
        "refused": 1,
        "probes": 1,
        "opened": 1,
        "closed": 1,
    }


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"failure_threshold": 0}, "failure_threshold"),
        ({"slow_call_s": 0.0}, "slow_call_s"),
        ({"slow_call_s": float("nan")}, "slow_call_s"),
        ({"open_s": 0.0}, "open_s"),
        ({"open_s": 9.0, "max_open_s": 8.0}, "open_s"),
    ],
)
def test_bad_settings_are_refused_by_name(clock, options, name):
    with pytest.raises(ValueError, match=name):
        CircuitBreaker(clock, **options)


def test_an_old_failure_is_none_of_the_new_ones_in_a_row(breaker, clock):
    """Calls that hung until after the probe say nothing of the store as it is now."""
    old = [breaker.try_enter() for _ in range(3)]
    fail(breaker, 3)
    clock.advance(1.0)
    breaker.succeeded(breaker.try_enter())
    for permit in old:
        breaker.failed(permit, cause="timeout")
    assert breaker.state is CLOSED
    assert breaker.counters()["failed"] == 6
