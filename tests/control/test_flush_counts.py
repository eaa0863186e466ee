"""What the metrics report of flushes: every flush is counted once, by what its caller was told."""

import pytest

from engine_driver import Driver
from headwater.messages.control import CancelOperation, FlushCache
from headwater.messages.state import EngineState, GetState


def state_of(driver: Driver) -> EngineState:
    driver.send(GetState(call_id="state"))
    driver.turn()
    return driver.replies["state"]  # type: ignore[return-value]


def ended(state: EngineState) -> dict[str, int]:
    return {key: count for key, count in state.flushes.items() if count}


@pytest.fixture
def driver() -> Driver:
    return Driver(num_pages=64)


def busy(driver: Driver) -> None:
    driver.generate("running", list(range(100, 140)), 200)
    driver.turn(4)


def test_each_outcome_is_counted_once(driver: Driver) -> None:
    driver.finish(driver.generate("warm", list(range(40)), 1))
    driver.settle()
    for call_id, mode in (("a", "idle"), ("b", "now"), ("c", "drain")):
        driver.send(FlushCache(call_id=call_id, mode=mode))
        driver.turn()
    assert ended(state_of(driver)) == {"idle:flushed": 1, "now:flushed": 1, "drain:flushed": 1}


def test_an_expired_flush_names_its_blockers(driver: Driver) -> None:
    busy(driver)
    driver.send(FlushCache(call_id="a"))
    driver.turn()
    assert driver.replies["a"].status == 400
    state = state_of(driver)
    assert ended(state) == {"idle:expired": 1}
    assert state.flush_blockers == {"running": 1}


def test_a_drain_that_is_answered_early_is_held(driver: Driver) -> None:
    busy(driver)
    driver.send(FlushCache(call_id="a", mode="drain"))
    driver.turn()
    assert driver.replies["a"].status == 202
    state = state_of(driver)
    assert ended(state) == {"drain:held": 1}
    assert state.flush_blockers == {"requests_holding_old_pages": 1}
    assert state.counters["retired_pages_held"] == driver.replies["a"].retired["device"].pages > 0


def test_a_cancelled_flush_is_no_expired_one(driver: Driver) -> None:
    busy(driver)
    driver.send(FlushCache(call_id="a", timeout_s=60))
    driver.turn()
    driver.send(CancelOperation(call_id="b", started_by_call="a"))
    driver.turn()
    state = state_of(driver)
    assert ended(state) == {"idle:cancelled": 1}
    assert state.flush_blockers == {}


def test_a_dry_run_is_no_flush(driver: Driver) -> None:
    driver.send(FlushCache(call_id="a", dry_run=True))
    driver.turn()
    assert ended(state_of(driver)) == {}


def test_the_wait_is_in_the_histogram_of_its_mode(driver: Driver) -> None:
    busy(driver)
    driver.send(FlushCache(call_id="a", timeout_s=2.0))
    driver.turn()
    driver.clock.advance(2.0)
    driver.turn()
    waited = driver.replies["a"].waited_s
    (idle,) = [found for found in state_of(driver).distributions if found.labels == {"mode": "idle"}]
    assert sum(idle.counts) == 1
    assert idle.total == pytest.approx(waited)
    assert idle.counts[[bound >= waited for bound in idle.bounds].index(True)] == 1


def test_every_outcome_is_there_before_it_happens(driver: Driver) -> None:
    """Prometheus sees no increase to the first value of a series, so the first expired flush would go unnoticed."""
    outcomes = ("flushed", "held", "store_pending", "expired", "cancelled")
    wanted = {f"{mode}:{outcome}": 0 for mode in ("idle", "now", "drain") for outcome in outcomes}
    assert state_of(driver).flushes == wanted
