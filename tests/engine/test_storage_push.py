"""`PersistCache`: a server that ends leaves in the store what it has cached, whatever its policy has copied before."""

import random

import pytest

from engine_driver import VOCAB_SIZE, Driver
from headwater.cache.host_tier import WritePolicy
from headwater.messages.cache import CachePersisted, PersistCache
from headwater.messages.control import CancelOperation, Failed
from headwater.storage.backend import WriteStatus
from headwater.storage.errors import StorageUnavailable
from headwater.storage.memory import MemoryBackend

PROMPT_TOKENS, NUM_PROMPTS = 32, 4
NUM_PAGES = NUM_PROMPTS * PROMPT_TOKENS // 4


class Store(MemoryBackend):
    is_down = False
    is_nearly_full = False  # it takes the first page of a call

    def put(self, keys, pages):
        if self.is_down:
            raise StorageUnavailable("the store is down")
        if self.is_nearly_full:
            return [*super().put(keys[:1], pages[:1]), *[WriteStatus.FULL] * (len(keys) - 1)]
        return super().put(keys, pages)


def prompt_of(seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]


def warm(backend: Store | None, policy: WritePolicy, **shape) -> Driver:
    """An engine that has computed the prompts."""
    driver = Driver(num_pages=80, **{"num_host_pages": 100, "backend": backend, **shape})
    driver.parts.cache.lower.write_policy = policy
    for number in range(NUM_PROMPTS):
        driver.finish(driver.generate(f"r{number}", prompt_of(number), 1))
    driver.settle()
    return driver


def persist(driver: Driver, *, timeout_s: float = 100.0) -> CachePersisted | Failed:
    driver.send(PersistCache(call_id="p", timeout_s=timeout_s))
    for _ in range(3000):
        driver.turn()
        if "p" in driver.replies:
            return driver.replies.pop("p")
    raise AssertionError("not answered")


@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH_SELECTIVE, WritePolicy.WRITE_BACK])
def test_what_no_policy_has_copied_is_found_by_another_engine(policy):
    store = Store(capacity_bytes=1 << 20)
    driver = warm(store, policy)
    assert store.usage().num_pages == 0
    answer = persist(driver)
    assert (answer.num_pages, answer.num_dropped, answer.is_whole) == (NUM_PAGES, 0, True)
    assert store.usage().num_pages == NUM_PAGES
    other = Driver(num_pages=80, num_host_pages=100, backend=store)
    for number in range(NUM_PROMPTS):
        request = other.generate(f"o{number}", prompt_of(number), 1)
        other.finish(request)
        assert request.meta.cached_storage > 0


def test_what_the_store_has_acknowledged_is_not_copied_again():
    driver = warm(Store(capacity_bytes=1 << 20), WritePolicy.WRITE_THROUGH)
    answer = persist(driver)
    assert (answer.num_pages, answer.is_whole) == (0, True)


def test_a_host_that_is_smaller_than_the_device_is_passed_through():
    store = Store(capacity_bytes=1 << 20)
    answer = persist(warm(store, WritePolicy.WRITE_BACK, num_host_pages=10))
    assert answer.is_whole and store.usage().num_pages == NUM_PAGES


def test_pages_of_the_host_that_the_store_did_not_take_are_offered_again():
    store = Store(capacity_bytes=1 << 20)
    store.is_down = True
    driver = warm(store, WritePolicy.WRITE_THROUGH)
    failed = persist(driver)
    assert not failed.is_whole and failed.num_dropped > 0 and store.usage().num_pages == 0
    store.is_down = False
    driver.clock.advance(1000.0)  # the breaker lets a call through
    driver.settle()
    assert persist(driver).is_whole and store.usage().num_pages == NUM_PAGES


def test_pages_that_the_store_took_in_part_are_offered_again():
    store = Store(capacity_bytes=1 << 20)
    store.is_nearly_full = True
    driver = warm(store, WritePolicy.WRITE_THROUGH)
    assert store.usage().num_pages == NUM_PROMPTS
    store.is_nearly_full = False
    answer = persist(driver)
    assert answer.is_whole and answer.num_pages == store.usage().num_pages == NUM_PAGES


def test_at_its_deadline_it_says_that_not_all_is_there():
    driver = warm(Store(capacity_bytes=1 << 20), WritePolicy.WRITE_BACK)
    driver.jobs.max_polls = 1000
    answer = persist(driver, timeout_s=0.0)
    assert not answer.is_whole


def test_without_a_store_it_is_refused_and_a_caller_that_leaves_ends_it():
    refused = persist(warm(None, WritePolicy.WRITE_BACK))
    assert isinstance(refused, Failed) and refused.status == 409
    driver = warm(Store(capacity_bytes=1 << 20), WritePolicy.WRITE_BACK)
    driver.jobs.max_polls = 1000
    driver.send(PersistCache(call_id="p", timeout_s=100.0))
    driver.turn(2)
    driver.send(CancelOperation(call_id="c", started_by_call="p"))
    driver.turn()
    assert not driver.replies["p"].is_whole and driver.parts.control.num_pending == 0
