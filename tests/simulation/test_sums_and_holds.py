"""Promises of sums in metrics, of holds, of what a flush has yet to do and of sleep: the engine right, and broken."""

from collections.abc import Callable

import pytest

from headwater.messages.control import FlushCache
from headwater.messages.weights import UpdateWeights
from headwater.simulation.checks.violation import Violation
from headwater.simulation.driver import Driver
from headwater.simulation.engine_shape import EngineShape
from headwater.simulation.fakes.store import UnreliableStore
from headwater.simulation.fakes.store_media import MemoryMedium
from headwater.simulation.mutants.check import all_mutants
from headwater.simulation.mutants.registry import MUTANTS

assert all_mutants()


def fail_a_step_of_two() -> Driver:
    driver = Driver(EngineShape())
    for number in range(2):
        driver.generate(f"r{number}", list(range(number, number + 6)), 4)
    driver.turn()
    driver.runner.next_fault = "collect"
    driver.finish()
    return driver


def retract_one() -> Driver:
    """Two requests of six pages each, and ten pages."""
    driver = Driver(EngineShape(num_pages=10))
    for number in range(2):
        driver.generate(f"r{number}", list(range(number, number + 8)), 16)
    driver.finish()
    assert driver.parts.scheduler.counters.num_retractions > 0
    return driver


def drain_with_hold() -> Driver:
    """A new request starts while a drain waits for the pages of another one."""
    driver = Driver(EngineShape())
    driver.generate("old", list(range(8)), 12)
    driver.turn(2)
    driver.send(FlushCache(call_id="f", mode="drain", hold=True, timeout_s=20.0))
    driver.turn()
    answer = driver.generate("new", list(range(20, 28)), 1)
    driver.turn(2)
    assert answer.finish and "f" not in driver.replies
    driver.finish()
    return driver


def read_weights() -> Driver:
    """A request starts while an update reads its files."""
    driver = Driver(EngineShape())
    driver.runner.weights.num_polls = 8
    driver.send(UpdateWeights(call_id="u", path="w1", timeout_s=20.0))
    driver.turn()
    answer = driver.generate("new", list(range(8)), 1)
    driver.turn(2)
    assert answer.finish and "u" not in driver.replies
    return driver


def read_weights_and_nothing_else() -> Driver:
    driver = Driver(EngineShape())
    driver.runner.weights.num_polls = 8
    driver.send(UpdateWeights(call_id="u", path="w1", timeout_s=20.0))
    driver.turn(12)
    assert "u" in driver.replies
    return driver


def flush_a_store_that_hangs() -> Driver:
    store = UnreliableStore(MemoryMedium(capacity_bytes=1 << 16), seed=0)
    driver = Driver(EngineShape(num_host_pages=40), backend=store)
    driver.jobs.hang_rate = 1.0
    driver.send(FlushCache(call_id="f", mode="now", tiers=("device", "host", "storage")))
    for _ in range(120):
        driver.turn()
        driver.clock.advance(0.01)
    return driver


def test_the_store_gets_its_second():
    answer = flush_a_store_that_hangs().replies["f"]
    assert (answer.status, answer.pending) == (202, ("storage",))
    assert 1.0 <= answer.waited_s < 1.1


@pytest.mark.parametrize(
    ("name", "promise", "play"),
    [
        ("a_failed_step_counts_one_request", "sums_agree", fail_a_step_of_two),
        ("retracted_tokens_count_again", "sums_agree", retract_one),
        ("every_flush_with_hold_holds", "held_by_what_holds", drain_with_hold),
        ("updates_hold_while_they_are_read", "held_by_what_holds", read_weights),
        ("pages_of_failed_steps_are_freed_before_the_recovery", "pages_outlive_steps", fail_a_step_of_two),
        ("the_loop_sleeps_through_reading", "ends_are_looked_for", read_weights_and_nothing_else),
        ("stores_get_no_second", "pending_is_told", flush_a_store_that_hangs),
        ("stores_that_are_asked_are_not_named", "pending_is_told", flush_a_store_that_hangs),
    ],
)
def test_engines_that_break_these_are_noticed(name: str, promise: str, play: Callable[[], Driver]) -> None:
    play()  # with the engine as it is
    with MUTANTS[name].in_force(), pytest.raises(Violation, match=promise):
        play()
