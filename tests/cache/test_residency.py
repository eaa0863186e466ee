"""How long pages stay: what the metrics report must be what happened, or people buy memory that they do not need."""

import pytest

from engine_driver import Driver
from headwater.cache.namespace import Tier
from headwater.cache.statistics.residency import BOUNDS_S, Residency
from headwater.clock import ManualClock
from headwater.messages.control import FlushCache
from headwater.messages.state import Distribution, GetState


def observed(found: Distribution) -> dict[float, int]:
    """Upper bound -> observations, without empty buckets."""
    return {bound: count for bound, count in zip((*BOUNDS_S, float("inf")), found.counts, strict=True) if count}


@pytest.fixture
def driver() -> Driver:
    driver = Driver(num_pages=24)
    driver.parts.cache.tier_pages[Tier.DEVICE].residency = Residency(driver.clock, one_in=1)
    return driver


def distributions(driver: Driver) -> dict[str, Distribution]:
    driver.send(GetState(call_id="state"))
    driver.turn()
    return {found.name: found for found in driver.replies["state"].distributions if found.labels == {"tier": "device"}}


def run(driver: Driver, rid: str, first: int) -> None:
    driver.finish(driver.generate(rid, list(range(first, first + 40)), 1))
    driver.settle()


def test_a_gap_between_two_uses_is_counted_by_pages(driver: Driver) -> None:
    run(driver, "a", 100)
    driver.clock.advance(40.0)
    run(driver, "b", 100)
    found = distributions(driver)["page_reuse_gap_seconds"]
    num_pages = (40 - 1) // driver.parts.cache.page_size  # the last token is computed
    assert observed(found) == {60.0: num_pages}
    assert found.total == pytest.approx(40.0 * num_pages, rel=0.1)  # turns take time as well


def test_an_evicted_page_has_its_lifetime_and_its_idle_time(driver: Driver) -> None:
    run(driver, "a", 100)
    driver.clock.advance(40.0)
    run(driver, "b", 100)  # used again: idle from here on
    driver.clock.advance(6.0)
    for number in range(2):
        run(driver, f"c{number}", 300 + number * 100)
    found = distributions(driver)
    evicted = driver.parts.cache.tier_pages[Tier.DEVICE].num_evicted
    assert evicted > 0
    assert observed(found["page_lifetime_seconds"]) == {60.0: evicted}
    assert observed(found["page_idle_before_eviction_seconds"]) == {10.0: evicted}


def test_a_flush_is_no_eviction(driver: Driver) -> None:
    run(driver, "a", 100)
    driver.send(FlushCache(call_id="f", mode="now"))
    driver.turn()
    assert driver.replies["f"].freed["device"].pages > 0
    assert observed(distributions(driver)["page_lifetime_seconds"]) == {}


def test_the_sample_is_the_share_that_it_says() -> None:
    residency = Residency(ManualClock(), one_in=8)
    assert sum(residency.begin() is not None for _ in range(8000)) == pytest.approx(1000, abs=5)


def test_no_fixed_stride_of_arrivals_escapes_the_sample() -> None:
    """A workload that publishes a prompt and an answer in turns must not have all its prompts in it, or none."""
    for stride in (2, 3, 4, 8, 16):
        residency = Residency(ManualClock(), one_in=8)
        drawn = [residency.begin() is not None for _ in range(4096)]
        for first in range(stride):
            each = drawn[first::stride]
            assert sum(each) / len(each) == pytest.approx(1 / 8, abs=0.03)
