"""What an engine reports of itself: its state in numbers, and a map of its prefix tree."""

from headwater.cache.namespace import Tier
from headwater.messages.control import FlushCache, PauseGeneration
from headwater.messages.snapshot import GetSnapshot, Snapshot
from headwater.messages.state import EngineState, GetState
from headwater.messages.two_phase import Commit, Prepare
from headwater.messages.weights import ReleaseMemory, UpdateWeights
from headwater.simulation.driver import Driver
from headwater.simulation.engine_shape import EngineShape


def state(driver: Driver) -> EngineState:
    found = _ask(driver, GetState(call_id="ask"))
    assert isinstance(found, EngineState)
    return found


def snapshot(driver: Driver) -> Snapshot:
    found = _ask(driver, GetSnapshot(call_id="ask"))
    assert isinstance(found, Snapshot)
    return found


def _ask(driver: Driver, message: GetState | GetSnapshot) -> object:
    driver.send(message)
    driver.turn()
    return driver.replies.pop(message.call_id)


def test_evicted_tokens_are_those_of_the_device() -> None:
    """Pages that the host evicts were on the device before, and would count twice."""
    driver = Driver(EngineShape(num_pages=16, num_host_pages=16))
    for number in range(8):
        driver.finish(driver.generate(f"r{number}", list(range(40 * number, 40 * number + 40)), 1))
        driver.settle()
    evicted = {tier: pages.num_evicted for tier, pages in driver.parts.cache.tier_pages.items()}
    assert evicted[Tier.HOST] > 0
    assert state(driver).counters["evicted_tokens"] == evicted[Tier.DEVICE] * 4


def test_a_change_is_reported_as_decided_until_it_is_made() -> None:
    """A fleet that brings an engine back waits for it: until then the engine's state is not known."""
    driver = Driver(EngineShape())
    parts = driver.parts
    parts.control.handle(Prepare(call_id="p", change=UpdateWeights(call_id="u", path="w1", timeout_s=20.0)), b"front")
    for _ in range(6):
        parts.control.advance()
    assert parts.report("").num_decided == 0
    parts.control.handle(Commit(call_id="c", prepared="u"), b"front")
    assert parts.report("").num_decided == 1
    parts.control.advance()
    assert parts.report("").num_decided == 0
    assert parts.scheduler.weights_id == "w1"


def test_every_order_by_which_requests_wait_is_named() -> None:
    """A health check that generates a token would else wait for it, and call a server ill that does as told."""
    driver = Driver(EngineShape())
    assert state(driver).held_by == ()
    driver.send(ReleaseMemory(call_id="r", tags=("kv_cache",)))
    driver.turn(3)
    assert state(driver).held_by == ("released_kv_cache",)
    driver.send(ReleaseMemory(call_id="r2"))
    driver.send(PauseGeneration(call_id="p"))
    driver.turn(3)
    assert state(driver).held_by == ("pause", "released_kv_cache", "released_weights")


def test_a_map_is_shown_again_only_until_something_was_flushed() -> None:
    """Who watches a flush sees its effect at once, though a map is drawn every few seconds only."""
    driver = Driver(EngineShape())
    driver.finish(driver.generate("a", list(range(20)), 1))
    drawn = snapshot(driver).map
    assert drawn.roots[0].num_tokens == 20
    driver.finish(driver.generate("b", list(range(100, 120)), 1))
    assert snapshot(driver).map is drawn, "it costs a walk over the tree"
    driver.send(FlushCache(call_id="f", mode="now"))
    driver.turn()
    assert snapshot(driver).map.nodes == ()
