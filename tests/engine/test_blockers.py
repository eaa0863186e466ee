"""Idle has one definition: what the registered components have in flight."""

from engine_driver import Driver
from headwater.engine.blockers import Blockers
from headwater.messages.control import FlushCache
from headwater.messages.weights import UpdateWeights

# How to make each component hold work across turns. A component registered without an entry here fails the
# test below: whoever adds one must say what it can hold, and show that it reports it.
HELD_WORK = {
    "scheduler": lambda driver: driver.generate("a", list(range(40)), 50),
    "control": lambda driver: driver.send(UpdateWeights(call_id="u", path="w1")),
    "cache": lambda driver: driver.generate("a", list(range(40)), 1),  # copied to the host, slowly
}


def test_every_component_that_holds_work_reports_it():
    names = set(Driver().parts.blockers.components)
    assert names == set(HELD_WORK)
    for name, hold_work in HELD_WORK.items():
        driver = Driver(num_host_pages=100, max_copy_polls=100_000)
        driver.runner.weights.num_polls = 1000
        assert driver.parts.blockers() == {}
        hold_work(driver)
        driver.turn(4)
        assert driver.parts.blockers.components[name].in_flight(), f"{name} holds work and reports none"
        driver.send(FlushCache(call_id="f"))
        driver.turn()
        assert driver.replies["f"].blockers == driver.parts.blockers()


def test_a_pending_operation_is_no_blocker_of_others():
    driver = Driver()
    driver.generate("a", list(range(40)), 50)
    driver.send(FlushCache(call_id="f", timeout_s=100.0))
    driver.turn()
    assert driver.parts.blockers() == {"running": 1}


def test_counts_of_the_same_name_add_up():
    class Busy:
        def in_flight(self) -> dict[str, int]:
            return {"copies": 2}

    blockers = Blockers()
    blockers.register("one", Busy())
    blockers.register("two", Busy())
    assert blockers() == {"copies": 4}
