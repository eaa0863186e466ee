"""The storage tier in the real loop: what survives, what a flush makes unreachable, what a broken store costs."""

import random

import numpy as np
import pytest

from engine_driver import VOCAB_SIZE, Driver, expected
from headwater.cache.namespace import Namespace
from headwater.cache.storage.tier import PrefetchPolicy, StorageSettings
from headwater.messages.control import FlushCache
from headwater.messages.weights import UpdateWeights
from headwater.storage.errors import StorageUnavailable
from headwater.storage.memory import MemoryBackend
from headwater.storage.page_key import chain_hashes, page_keys

POLICIES = pytest.mark.parametrize("policy", list(PrefetchPolicy), ids=[p.value for p in PrefetchPolicy])


def prompt_of(length: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


class BreakableBackend(MemoryBackend):
    """A store that can be made to refuse everything."""

    is_down = False

    def _check(self) -> None:
        if self.is_down:
            raise StorageUnavailable("the store is down")

    def generations(self, scope_ids):
        self._check()
        return super().generations(scope_ids)

    def raise_generation(self, scope_id):
        self._check()
        return super().raise_generation(scope_id)

    def exists(self, keys):
        self._check()
        return super().exists(keys)

    def get(self, keys, into):
        self._check()
        return super().get(keys, into)

    def reap(self, *, max_pages, abandoned=()):
        self._check()
        return super().reap(max_pages=max_pages, abandoned=abandoned)

    def put(self, keys, pages):
        self._check()
        return super().put(keys, pages)


def store() -> BreakableBackend:
    return BreakableBackend(capacity_bytes=1 << 20)


def engine(backend=None, **kwargs) -> Driver:
    driver = Driver(num_pages=40, num_host_pages=100, backend=backend, **kwargs)
    return driver


def run(driver: Driver, rid: str, prompt: list[int], num_tokens: int = 2, weights: str = "w0", **kwargs):
    answer = driver.generate(rid, prompt, num_tokens, **kwargs)
    driver.finish(answer)
    assert answer.tokens == expected(prompt, num_tokens, weights, cache_salt=kwargs.get("cache_salt", ""))
    driver.settle()
    return answer


@POLICIES
def test_a_restart_finds_its_pages_in_storage(policy):
    backend, prompt = store(), prompt_of(60)
    settings = StorageSettings(policy=policy, min_prefetch_tokens=4)
    run(engine(backend, storage_settings=settings), "a", prompt)
    after = engine(backend, storage_settings=settings)
    first = run(after, "b", prompt)
    if policy is PrefetchPolicy.BEST_EFFORT:
        first = run(after, "c", prompt)  # it waits for nobody; the next one finds what came meanwhile
        assert first.meta.cached_device + first.meta.cached_host + first.meta.cached_storage == 56
    else:
        assert (first.meta.cached_storage, first.meta.cached_host, first.meta.cached_device) == (56, 0, 0)


# --- what is computed before the store has told its counters can never be stored ---------------------


def dropped(driver: Driver) -> dict[str, int]:
    return driver.parts.cache.lower.transfers.counters.dropped_pages


@POLICIES
@pytest.mark.parametrize("num_tokens", [9, 60])
def test_the_first_pages_of_a_namespace_are_stored_too(policy, num_tokens):
    """They were dropped: the answer came one turn after they had been computed. Short prompts look nothing up."""
    backend, prompt = store(), prompt_of(num_tokens)
    driver = engine(backend, storage_settings=StorageSettings(policy=policy, min_prefetch_tokens=16))
    driver.jobs.max_polls = 3
    for salt in ("", "a", "b"):
        run(driver, f"r{salt}", prompt, cache_salt=salt)
    assert "persist_generation_unknown" not in dropped(driver)
    assert backend.usage().num_pages == 3 * ((num_tokens + 1) // 4)


def test_one_question_for_many_requests_of_a_new_namespace():
    backend = store()
    driver = engine(backend)
    driver.jobs.max_polls = 50
    for i in range(8):
        driver.generate(f"r{i}", prompt_of(3, i), 2)
    driver.turn()
    assert len([job for job in driver.jobs.open_jobs if "ask" in job._work.__qualname__]) == 1
    driver.finish()


@POLICIES
def test_nobody_waits_long_for_a_store_that_does_not_answer(policy):
    """A namespace is new here and the store hangs: a quarter of a second, then the request computes."""
    backend = store()
    driver = engine(backend, storage_settings=StorageSettings(policy=policy, min_prefetch_tokens=1000))
    driver.jobs.hang_rate = 1.0
    answer, started_s = driver.generate("a", prompt_of(60), 2), driver.clock.now()
    driver.finish(answer, max_turns=100_000)
    assert driver.clock.now() - started_s < 0.3
    assert dropped(driver)["persist_generation_unknown"] > 0, "so it was computed without knowing"
    driver.jobs.hang_rate = 0.0
    driver.jobs.release_hanging()


def test_a_timeout_is_kept_though_the_read_under_way_hangs():
    """The request waited for the end of the call, which may be seconds after its own time was up."""
    backend, prompt = store(), prompt_of(60)
    run(engine(backend), "a", prompt)
    settings = StorageSettings(policy=PrefetchPolicy.TIMEOUT, min_prefetch_tokens=4, wait_base_s=0.5)
    driver = engine(backend, storage_settings=settings)
    driver.jobs.hang_rate = 1.0
    started_s = driver.clock.now()
    driver.finish(driver.generate("b", prompt, 2), max_turns=100_000)
    assert 0.5 <= driver.clock.now() - started_s < 0.6
    driver.jobs.hang_rate = 0.0
    driver.jobs.release_hanging()
    driver.settle()


def test_a_request_that_runs_across_a_flush_by_another_server_is_not_stored_as_new():
    """Rule 7: its first pages are older than the flush, whatever this server has heard of the store meanwhile."""
    backend, prompt = store(), prompt_of(8)
    one, other = engine(backend), engine(backend)
    answer = one.generate("long", prompt, 40)
    one.turn(10)
    other.send(FlushCache(call_id="f", tiers=("storage",)))
    other.turn(3)
    assert other.replies["f"].status == 200
    run(one, "hears", prompt_of(60, 2))  # asks the store, and is told the counters of today
    one.finish(answer)
    one.settle()
    assert not backend.exists(page_keys_of(one, prompt + answer.tokens))[3]
    assert run(engine(backend), "c", [*prompt, *answer.tokens][:40]).meta.cached_storage == 0


def page_keys_of(driver: Driver, tokens: list[int]):
    """Names of the pages of `tokens` under the store's counters of now."""
    names = driver.parts.storage._names
    namespace = Namespace("", "", "", "w0")
    generations = driver.parts.cache.lower.storage.backend.generations(names.scopes(namespace))
    hashes = chain_hashes(names.seed(namespace), np.array(tokens, dtype=np.int32), 4)
    return page_keys(names.bucket(namespace, generations), hashes)


def test_what_runs_while_a_store_is_attached_is_not_stored_and_what_starts_then_is():
    backend, prompt = store(), prompt_of(12)
    driver = Driver(num_pages=60, num_host_pages=100)
    answer = driver.generate("a", prompt, 60)
    driver.turn(8)
    driver.attach(backend)
    driver.turn(2)
    run(driver, "b", prompt_of(30, 3))
    assert backend.usage().num_pages == 7
    driver.finish(answer)
    driver.settle()
    assert backend.usage().num_pages == 7
    assert dropped(driver)["persist_generation_unknown"] == 14


def test_after_a_flush_of_the_store_the_next_pages_are_stored_at_once():
    backend, prompt = store(), prompt_of(60)
    driver = engine(backend)
    run(driver, "a", prompt)
    driver.send(FlushCache(call_id="f", tiers=("device", "host", "storage")))
    driver.turn(3)
    assert driver.replies["f"].status == 200
    driver.turn(2)
    generations = driver.parts.cache.lower.storage.generations
    assert generations.known(next(iter(generations._known)))
    run(driver, "b", prompt)
    assert "persist_generation_unknown" not in dropped(driver)
    assert run(engine(backend), "c", prompt).meta.cached_storage == 56


def test_two_servers_share_a_store_and_salts_and_weights_isolate():
    backend, prompt = store(), prompt_of(60)
    one, two = engine(backend), engine(backend)
    run(one, "a", prompt, cache_salt="tenant")
    assert run(two, "b", prompt, cache_salt="other").meta.cached_storage == 0
    assert run(two, "c", prompt).meta.cached_storage == 0
    assert run(two, "d", prompt, cache_salt="tenant").meta.cached_storage == 56
    other = engine(backend, weights_id="w1")
    assert run(other, "e", prompt, weights="w1", cache_salt="tenant").meta.cached_storage == 0


def test_new_weights_find_nothing_of_the_old_and_old_ones_their_own_again():
    backend, prompt = store(), prompt_of(60)
    driver = engine(backend)
    run(driver, "a", prompt)
    for n, path in enumerate(("w1", "w0")):
        driver.send(UpdateWeights(call_id=f"u{n}", path=path))
        while f"u{n}" not in driver.replies:
            driver.turn()
        hit = run(driver, f"b{n}", prompt, weights=path).meta
        assert (hit.cached_device, hit.cached_host) == (0, 0)
        assert hit.cached_storage == (56 if path == "w0" else 0)


def test_a_flush_of_storage_makes_it_unreachable_for_every_server():
    backend, prompt = store(), prompt_of(60)
    one, two = engine(backend), engine(backend)
    run(one, "a", prompt)
    one.send(FlushCache(call_id="f", tiers=("device", "host", "storage")))
    one.turn(3)
    done = one.replies["f"]
    assert (done.status, done.pending, done.still_warm) == (200, (), ())
    assert run(one, "b", prompt).meta.cached_storage == 0
    restarted = engine(backend)
    assert run(restarted, "d", prompt).meta.cached_storage == 56  # what b computed after the flush
    assert run(two, "c", prompt_of(60, 2)).meta.cached_storage == 0


def test_the_default_flush_leaves_storage_warm_and_says_so():
    backend, prompt = store(), prompt_of(60)
    driver = engine(backend)
    run(driver, "a", prompt)
    driver.send(FlushCache(call_id="f"))
    driver.turn(2)
    assert driver.replies["f"].still_warm == ("storage",)
    assert run(driver, "b", prompt).meta.cached_storage == 56


def test_pages_computed_before_a_flush_are_never_stored_after_it():
    """Rule 7: a server that has old pages on its host must not write them under the new generation."""
    backend, prompt = store(), prompt_of(60)
    slow, other = engine(backend), engine(backend)
    run(slow, "known", prompt_of(20, 9))  # the namespace's counters are known
    slow.jobs.hang_rate = 1.0
    answer = slow.generate("a", prompt, 2)
    slow.finish(answer, max_turns=20_000)
    other.send(FlushCache(call_id="f", tiers=("storage",)))
    other.turn(3)
    assert other.replies["f"].status == 200
    slow.jobs.hang_rate = 0.0
    slow.jobs.release_hanging()  # the late writes arrive
    slow.turn(5)
    assert run(other, "b", prompt).meta.cached_storage == 0
    assert run(engine(backend), "c", prompt).meta.cached_storage in (0, 56)  # b's own pages at most


def test_a_store_that_is_down_answers_202_and_shows_nothing_old_when_it_is_back():
    backend, prompt = store(), prompt_of(60)
    driver = engine(backend)
    run(driver, "a", prompt)
    backend.is_down = True
    driver.send(FlushCache(call_id="f", mode="now", tiers=("device", "host", "storage"), timeout_s=2.0))
    for _ in range(400):
        driver.turn()
        if "f" in driver.replies:
            break
    late = driver.replies["f"]
    assert (late.status, late.success, late.pending) == (202, True, ("storage",))
    assert 2.0 <= late.waited_s < 2.1
    assert run(driver, "b", prompt).meta.cached_storage == 0
    backend.is_down = False
    driver.clock.advance(1.0)
    driver.turn(5)
    fresh = engine(backend)
    assert run(fresh, "c", prompt).meta.cached_storage == 0
    driver.clock.advance(60.0)  # the breaker closes again
    driver.turn(5)
    driver.send(FlushCache(call_id="g"))
    driver.turn(2)
    run(driver, "d", prompt_of(60, 5))
    driver.send(FlushCache(call_id="h"))
    driver.turn(2)
    assert run(driver, "e", prompt_of(60, 5)).meta.cached_storage == 56  # it is used again


@pytest.mark.parametrize("down_from", ["start", "middle"])
def test_a_broken_store_costs_hits_and_never_a_request(down_from):
    backend = store()
    driver = engine(backend)
    backend.is_down = down_from == "start"
    for i in range(12):
        if i == 4:
            backend.is_down = True
        run(driver, f"r{i}", prompt_of(60, i))
    assert driver.parts.cache.lower.storage.calls.breaker.counters()["opened"] >= 1


def test_a_store_that_hangs_stops_neither_requests_nor_a_flush():
    backend, prompt = store(), prompt_of(60)
    settings = StorageSettings(min_prefetch_tokens=4, call_timeout_s=0.5, wait_base_s=0.2)  # turns take a millisecond
    driver = engine(backend, max_copy_polls=2, storage_settings=settings)
    run(driver, "a", prompt)
    driver.jobs.hang_rate = 1.0
    for i in range(6):
        answer = driver.generate(f"h{i}", prompt_of(60, 10 + i), 2)
        driver.finish(answer, max_turns=100_000)
        assert answer.tokens == expected(prompt_of(60, 10 + i), 2)
    driver.send(FlushCache(call_id="f", timeout_s=10.0))
    for _ in range(20_000):
        driver.turn()
        if "f" in driver.replies:
            break
    assert driver.replies["f"].status == 200
    driver.jobs.hang_rate = 0.0
    driver.jobs.release_hanging()  # threads that come back late find their pages in other hands, and leave them alone
    for i in range(4):
        run(driver, f"z{i}", prompt_of(60, 20 + i))
    driver.check_all_pages_back()


def test_bits_that_flip_in_a_stored_page_are_a_miss():
    backend, prompt = store(), prompt_of(60)
    run(engine(backend), "a", prompt)
    pages = sorted(backend._pages, key=lambda key: key.depth)
    backend.flip_bit(pages[5], 1000)
    second, third = engine(backend), engine(backend)
    assert run(second, "b", prompt).meta.cached_storage == 20  # what lies before the damage
    assert dropped(second) == {"prefetch_corrupt": 1, "prefetch_hit": 8}  # what lies behind it was read in vain
    assert run(third, "c", prompt).meta.cached_storage == 56  # b stored it again
    assert dropped(third) == {}, "all that was read is used"


@POLICIES
def test_a_prefetch_whose_pages_were_retired_does_not_come_back(policy):
    backend, prompt = store(), prompt_of(60)
    run(engine(backend), "a", prompt)
    driver = engine(backend, storage_settings=StorageSettings(policy=policy, min_prefetch_tokens=4))
    driver.jobs.max_polls = 20
    answer = driver.generate("b", prompt, 2)
    driver.turn(2)
    driver.send(FlushCache(call_id="f", mode="now", tiers=("device", "host", "storage"), timeout_s=5.0))
    driver.finish(answer, max_turns=5000)
    driver.settle()
    assert answer.tokens == expected(prompt, 2)
    while "f" not in driver.replies:
        driver.turn()
    assert driver.replies["f"].status == 200
    later = driver.generate("c", prompt, 2)
    driver.finish(later)
    hit = later.meta.cached_device + later.meta.cached_host + later.meta.cached_storage
    assert hit in (0, 56)  # only what b computed after the flush
    driver.settle()


def test_detach_in_the_middle_of_reads_and_writes_leaves_serving_untouched():
    backend, prompt = store(), prompt_of(60)
    run(engine(backend), "a", prompt)
    driver = engine(backend)
    driver.jobs.max_polls = 30
    answers = [driver.generate("b", prompt, 2), driver.generate("c", prompt_of(60, 3), 2)]
    driver.turn(3)
    driver.parts.cache.detach_storage()
    driver.finish()
    driver.settle()
    assert answers[0].tokens == expected(prompt, 2)
    driver.check_all_pages_back()
