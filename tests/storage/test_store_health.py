"""What is said of a store in trouble: by kind of call, from its first failure to its recovery."""

import pytest

from headwater.cache.storage.health import FAILURES_THAT_COUNT, CallKind, StoreHealth
from headwater.clock import ManualClock
from headwater.storage.guard import CircuitBreaker


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def breaker(clock: ManualClock) -> CircuitBreaker:
    return CircuitBreaker(clock, failure_threshold=5, open_s=1.0)


@pytest.fixture
def health(clock: ManualClock, breaker: CircuitBreaker) -> StoreHealth:
    return StoreHealth(clock, breaker)


def fail(health: StoreHealth, breaker: CircuitBreaker, *kinds: CallKind) -> None:
    for kind in kinds:
        permit = breaker.try_enter()
        assert permit is not None
        breaker.failed(permit, cause="unavailable", details="refused")
        health.failed(kind, cause="unavailable", details="refused")


def succeed(health: StoreHealth, breaker: CircuitBreaker, kind: CallKind) -> None:
    permit = breaker.try_enter()
    assert permit is not None
    assert breaker.succeeded(permit)
    health.succeeded(kind, is_probe=permit.is_probe)


def test_a_store_that_is_well_and_one_that_fails_once(health: StoreHealth, breaker: CircuitBreaker) -> None:
    assert health.trouble() is None
    fail(health, breaker, *[CallKind.WRITE] * (FAILURES_THAT_COUNT - 1))
    assert health.trouble() is None


def test_writes_that_fail_between_reads_that_succeed(
    health: StoreHealth, breaker: CircuitBreaker, clock: ManualClock
) -> None:
    """A Redis server without room for its snapshot: the breaker never sees five failures in a row."""
    for _ in range(FAILURES_THAT_COUNT):
        fail(health, breaker, CallKind.WRITE)
        succeed(health, breaker, CallKind.UPKEEP)
        clock.advance(1)
    assert breaker.state == "closed"
    trouble = health.trouble()
    assert trouble is not None
    assert (trouble.is_left_alone, trouble.failing, trouble.retry_in_s) == (False, ("write",), 0)
    assert (trouble.cause, trouble.details, trouble.failing_s) == ("unavailable", "refused", 3)
    succeed(health, breaker, CallKind.READ)
    assert health.trouble() is not None, "a read says nothing of writes"
    succeed(health, breaker, CallKind.WRITE)
    assert health.trouble() is None


def test_failures_of_all_kinds_open_the_breaker_and_a_probe_of_any_kind_ends_the_trouble(
    health: StoreHealth, breaker: CircuitBreaker, clock: ManualClock
) -> None:
    fail(health, breaker, CallKind.WRITE, CallKind.LOOK_UP, CallKind.WRITE, CallKind.LOOK_UP)
    assert health.trouble() is None
    clock.advance(2)
    fail(health, breaker, CallKind.UPKEEP)
    trouble = health.trouble()
    assert trouble is not None
    assert (trouble.is_left_alone, trouble.failing_s, trouble.retry_in_s) == (True, 2, 1)
    clock.advance(1.5)
    assert breaker.state == "half_open"
    trouble = health.trouble()
    assert trouble is not None, "until the probe has succeeded"
    assert trouble.retry_in_s == 0
    succeed(health, breaker, CallKind.UPKEEP)
    assert health.trouble() is None
    fail(health, breaker, CallKind.WRITE)
    assert health.trouble() is None, "what failed before the probe counts no more"
