"""Opening, attaching and replacing stores: none is left open, and the policies that are asked for hold."""

import random

import pytest

from engine_driver import VOCAB_SIZE, Driver, expected
from headwater.control.storage_opening import Opening
from headwater.messages.cache import AttachStorage, DetachStorage, GetStorage, StorageInfo
from headwater.messages.control import CancelOperation, Failed
from headwater.simulation.fakes.jobs import FakeJobRunner
from headwater.storage.errors import StorageUnavailable
from headwater.storage.memory import MemoryBackend


class Store(MemoryBackend):
    """Says whether it was closed, and may be one that cannot be reached."""

    def __init__(self, kind: str = "memory", *, is_down: bool = False) -> None:
        super().__init__(capacity_bytes=1 << 20)
        self.kind = kind  # type: ignore[misc]
        self.is_down = is_down
        self.num_closed = 0

    def usage(self):
        if self.is_down:
            raise StorageUnavailable("nobody there")
        return super().usage()

    def close(self) -> None:
        self.num_closed += 1
        super().close()


def attach(driver: Driver, call_id: str = "a", **fields) -> StorageInfo | Failed:
    driver.send(AttachStorage(call_id=call_id, kind="memory", **fields))
    for _ in range(3000):
        driver.turn()
        if call_id in driver.replies:
            return driver.replies.pop(call_id)
    raise AssertionError("not answered")


def prompt_of(length: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


def run_all(jobs: FakeJobRunner) -> None:
    """What the threads do in the end, whoever still waits for it."""
    for job in list(jobs._open):
        job.run_late()


@pytest.mark.parametrize("when", ["queued", "opening", "open"])
def test_a_store_that_opens_after_it_was_given_up_is_closed(when: str) -> None:
    """Its files or connections stayed open for as long as the server ran."""
    jobs, store = FakeJobRunner(), Store()
    jobs.max_polls = 0 if when == "open" else 5
    opening: list[Opening] = []

    def open_store() -> Store:
        if when == "opening":
            opening[0].abandon()  # the deadline passes while the folder is being read
        return store

    opening.append(Opening(jobs, open_store))
    if when == "open":
        assert opening[0].is_ready()
        opening[0].abandon()
    elif when == "queued":
        opening[0].abandon()
    run_all(jobs)
    assert store.num_closed == 1
    assert opening[0]._backend is None


def test_a_redis_that_cannot_be_reached_is_refused_and_closed() -> None:
    jobs, store = FakeJobRunner(), Store("redis", is_down=True)
    opening = Opening(jobs, lambda: store)
    assert opening.is_ready() and opening.error() == "nobody there" and store.num_closed == 1


def test_an_attach_that_is_cancelled_or_late_leaves_no_store_open() -> None:
    driver = Driver(num_pages=40, num_host_pages=100)
    store = Store()
    driver.parts.storage._opener = lambda kind, **options: store
    driver.jobs.hang_rate = 1.0
    assert isinstance(attach(driver, timeout_s=0.5), Failed)
    driver.send(AttachStorage(call_id="b", kind="memory"))
    driver.turn()
    driver.send(CancelOperation(call_id="c", started_by_call="b"))
    driver.turn()
    assert isinstance(driver.replies["b"], Failed)
    driver.jobs.hang_rate = 0.0
    driver.jobs.release_hanging()
    driver.turn(3)
    assert store.num_closed == 2 and driver.parts.cache.lower.storage is None


def test_the_same_store_with_a_policy_keeps_it_and_changes_the_policy() -> None:
    """Opened anew it would give up what is in flight and forget its counters."""
    driver = Driver(num_pages=40, num_host_pages=100)
    stores: list[Store] = []
    driver.parts.storage._opener = lambda kind, **options: stores.append(Store()) or stores[-1]
    assert attach(driver).message == "attached"
    tier = driver.parts.cache.lower.storage
    info = attach(driver, prefetch_policy="best_effort", write_policy="write_through_selective")
    assert (info.message, info.prefetch_policy, info.write_policy) == (
        "policies changed", "best_effort", "write_through_selective",
    )  # fmt: skip
    assert driver.parts.cache.lower.storage is tier and len(stores) == 1
    assert attach(driver).message == "attached", "without a policy it is opened anew: it may have been broken"
    assert len(stores) == 2 and driver.parts.cache.lower.storage.settings.policy.value == "best_effort"
    assert attach(driver, size_bytes=1 << 20, write_policy="write_back").message == "attached", "another size"
    run_all(driver.jobs)
    assert [store.num_closed for store in stores] == [1, 1, 0]


def test_a_store_that_takes_the_place_of_another_says_what_it_has_given_up() -> None:
    driver = Driver(num_pages=40, num_host_pages=100)
    driver.parts.storage._opener = lambda kind, **options: Store()
    assert attach(driver).num_given_up == 0
    driver.finish(driver.generate("asks for the store's generations", [1, 2, 3], 1))
    driver.jobs.hang_rate = 1.0
    driver.finish(driver.generate("is too short for a look into the store", [4, 5, 6], 6))
    driver.turn(5)
    assert driver.parts.cache.lower.storage.in_flight() == {"persist": 1}
    driver.jobs.hang_rate = 0.0
    assert attach(driver).num_given_up == 1


def test_a_write_policy_holds_from_the_moment_it_is_set() -> None:
    driver = Driver(num_pages=40, num_host_pages=100)
    driver.engine.store = Store()

    def num_offloaded(seed: int) -> int:
        before = driver.parts.cache.lower.transfers.counters.pages.get("offload", 0)
        answer = driver.generate(f"r{seed}", prompt_of(40, seed), 2)
        driver.finish(answer)
        assert answer.tokens == expected(prompt_of(40, seed), 2)
        driver.settle()
        return driver.parts.cache.lower.transfers.counters.pages.get("offload", 0) - before

    assert num_offloaded(1) == 10
    attach(driver, write_policy="write_back")
    assert num_offloaded(2) == 0
    attach(driver, write_policy="write_through")
    assert num_offloaded(3) == 10
    driver.send(DetachStorage(call_id="d"))
    driver.send(GetStorage(call_id="g"))
    driver.turn()
    assert driver.replies["g"].write_policy == "write_through"
