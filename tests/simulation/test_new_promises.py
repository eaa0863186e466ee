"""Promises of service, scopes and counts: each in its shortest form, with the engine as it is and broken."""

import pytest

from headwater.cache.host_tier import WritePolicy
from headwater.cache.prefix_cache import PrefixCache
from headwater.messages.control import FlushCache, PauseGeneration
from headwater.messages.generation import LogprobParams
from headwater.simulation.checks.violation import Violation
from headwater.simulation.driver import Driver, GeneratedAnswer
from headwater.simulation.engine_shape import EngineShape
from headwater.simulation.fakes.store import UnreliableStore
from headwater.simulation.fakes.store_media import MemoryMedium
from headwater.simulation.mutants.check import all_mutants
from headwater.simulation.mutants.registry import MUTANTS

assert all_mutants()


def warm(driver: Driver) -> None:
    """Pages of three namespaces."""
    for number, (salt, key) in enumerate((("a", "k"), ("a", "l"), ("b", "k"))):
        driver.generate(f"r{number}", list(range(12)), 2, cache_salt=salt, extra_key=key)
    driver.finish()


def flush_by_salt_and_key() -> Driver:
    driver = Driver(EngineShape())
    warm(driver)
    driver.send(FlushCache(call_id="f", mode="now", cache_salt="a", extra_key="k"))
    driver.turn()
    return driver


def test_a_flush_takes_what_its_parameters_name():
    answer = flush_by_salt_and_key().replies["f"]
    assert (answer.freed["device"].pages, answer.retired["device"].pages) == (3, 0)


def test_a_flush_that_drops_a_parameter_is_noticed():
    """The scope is read from the message, not from what the engine made of it."""
    with MUTANTS["flush_by_salt_and_key_drops_the_key"].in_force(), pytest.raises(Violation, match="flush_is_exact"):
        flush_by_salt_and_key()


def fill_the_queue() -> Driver:
    driver = Driver(EngineShape(max_running=1, max_queued=2))
    for number in range(5):
        driver.generate(f"r{number}", list(range(number, number + 6)), 3)
        driver.turn(number == 0)
    driver.turn()
    return driver


def test_a_queue_takes_as_many_as_it_may_and_no_more():
    driver = fill_the_queue()
    ended = {rid: answer.finish for rid, answer in driver.answers.items()}
    assert [ended[rid].status if ended[rid] else 0 for rid in sorted(ended)] == [0, 0, 0, 429, 429]
    driver.finish()


@pytest.mark.parametrize("mutant", ["the_queue_takes_one_more", "running_requests_fill_the_queue"])
def test_a_queue_of_another_length_is_noticed(mutant):
    with MUTANTS[mutant].in_force(), pytest.raises(Violation, match="refused_only_if_full"):
        fill_the_queue()


def overtake() -> None:
    driver = Driver(EngineShape(max_running=1))
    driver.generate("first", list(range(5)), 3)
    driver.turn()
    driver.generate("low", list(range(10, 15)), 2)
    driver.generate("later", list(range(20, 25)), 2)
    driver.generate("high", list(range(30, 35)), 2, priority=1)
    driver.finish()


def test_service_is_by_priority_and_then_by_arrival():
    overtake()


@pytest.mark.parametrize("mutant", ["the_newest_is_served_first", "priorities_are_ignored"])
def test_overtaking_is_noticed(mutant):
    with MUTANTS[mutant].in_force(), pytest.raises(Violation, match="served_in_order"):
        overtake()


def pause_with_retract() -> Driver:
    driver = Driver(EngineShape())
    for number in range(3):
        driver.generate(f"r{number}", list(range(number, number + 6)), 8)
    driver.turn(2)
    driver.send(PauseGeneration(call_id="p", mode="retract"))
    driver.turn()
    return driver


def test_a_pause_tells_how_many_it_retracted():
    assert pause_with_retract().replies["p"].num_requests == 3


def test_a_request_that_keeps_its_pages_through_a_retraction_is_noticed():
    with MUTANTS["retract_spares_one"].in_force(), pytest.raises(Violation, match="retract_spares_none"):
        pause_with_retract()


def spoil(*, is_async: bool) -> Driver:
    """A prompt is computed with logits that are not finite; then others ask for the same prompt."""
    driver = Driver(EngineShape(is_async=is_async))
    driver.runner.not_finite_rate = 1.0
    spoilt = driver.generate("spoilt", list(range(20)), 8)
    driver.turn()
    driver.runner.not_finite_rate = 0.0
    driver.finish(spoilt)
    assert spoilt.finish is not None and spoilt.finish.status == 500
    driver.generate("next", list(range(20)), 8)
    driver.finish()
    return driver


@pytest.mark.parametrize("is_async", [False, True])
def test_nobody_finds_what_came_with_logits_that_are_not_finite(is_async):
    """Its pages were published before the logits were looked at: one bad step was served from the cache for ever."""
    assert spoil(is_async=is_async).answers["next"].finish.type in ("length", "stop")


@pytest.mark.parametrize("is_async", [False, True])
def test_pages_of_a_step_that_is_not_finite_are_noticed(is_async):
    with MUTANTS["what_is_not_finite_is_shared"].in_force(), pytest.raises(Violation, match="kv_is_its_own"):
        spoil(is_async=is_async)


def store_old_pages_again() -> Driver:
    """Pages from before a flush of the store come down to the device again, and are offered to the store."""
    store = UnreliableStore(MemoryMedium(capacity_bytes=1 << 20), seed=0)
    shape = EngineShape(num_pages=40, num_host_pages=40, write_policy=WritePolicy.WRITE_THROUGH_SELECTIVE)
    driver = Driver(shape, backend=store)
    prompt = list(range(13))
    calls = iter(range(100))

    def ask(**fields: object) -> GeneratedAnswer:
        answer = driver.generate(f"r{next(calls)}", prompt, 2, **fields)
        driver.finish(answer)
        driver.settle()
        return answer

    def flush(*tiers: str) -> None:
        driver.send(FlushCache(call_id=f"f{next(calls)}", mode="now", tiers=tiers))
        driver.settle()

    ask()
    ask()  # a hit: to the host, and to the store
    flush("device")
    flush("storage")
    ask(logprobs=LogprobParams(prompt_start=0))  # computes all of it, beside what the host has from before
    flush("device")
    assert ask().meta.cached_host > 0
    flush("host")
    ask()  # a hit: to the host again, and to the store if that may have it
    flush("device", "host")
    assert ask().meta.cached_storage == 0
    return driver


def test_pages_from_before_a_flush_of_the_store_are_not_stored_after_it():
    store_old_pages_again()


def test_counters_of_a_later_publisher_on_older_pages_are_noticed(monkeypatch):
    """Random runs have not met this in 150,000 turns: it takes seven steps in this order."""
    right = PrefixCache._share

    def share(self, lease, node):
        for run in node.runs.values():
            run.generations = lease.generations
        right(self, lease, node)

    monkeypatch.setattr(PrefixCache, "_share", share)
    with pytest.raises(Violation, match="flushed_store_is_gone"):
        store_old_pages_again()
