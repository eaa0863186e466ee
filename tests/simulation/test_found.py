"""What the simulation found in the engine, each in its shortest form."""

import pytest

from engine_driver import Driver, expected
from headwater.cache.host_tier import WritePolicy
from headwater.messages.adapters import LoadAdapter, UnloadAdapter
from headwater.messages.base import pack_ids
from headwater.messages.cache import AttachStorage, DetachStorage
from headwater.messages.control import ContinueGeneration, FlushCache, PauseGeneration
from headwater.messages.generation import Abort, Generate, Output, SamplingParams
from headwater.messages.weights import ReleaseMemory, SetWeightVersion, UpdateWeights
from headwater.simulation.fakes.store import UnreliableStore
from headwater.simulation.fakes.store_media import MemoryMedium

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@BOTH
@pytest.mark.parametrize("gap", [0, 1])
def test_a_pause_is_answered_though_continue_comes_at_once(is_async, gap):
    """It waited for a moment without a step in flight, which under load came never again."""
    driver = Driver(is_async=is_async)
    driver.generate("a", list(range(20)), 200)
    driver.turn(3)
    driver.send(PauseGeneration(call_id="p", mode="in_place"))
    driver.turn(gap)
    driver.send(ContinueGeneration(call_id="c"))
    driver.turn(3)
    assert driver.replies["p"].num_requests == 1
    driver.finish()


@BOTH
def test_a_pause_that_is_continued_in_the_same_turn_has_its_effect(is_async):
    driver = Driver(is_async=is_async)
    answer = driver.generate("a", list(range(20)), 200)
    driver.turn(3)
    driver.send(PauseGeneration(call_id="p", mode="abort"))
    driver.send(ContinueGeneration(call_id="c"))
    driver.turn()
    assert answer.finish.type == "abort"
    assert driver.replies["p"].num_requests == 1


@BOTH
def test_a_pause_that_is_continued_counts_those_that_a_later_message_of_the_turn_ends(is_async):
    """The checks took the number that ran after the abort for the one that the pause should have told."""
    driver = Driver(is_async=is_async)
    driver.generate("a", list(range(20)), 200)
    driver.turn(3)
    driver.send(PauseGeneration(call_id="p", mode="in_place"))
    driver.send(ContinueGeneration(call_id="c"))
    driver.send(Abort(call_id="x", match="all"))
    driver.turn()
    assert driver.replies["p"].num_requests == 1


def test_a_deadline_that_passes_between_two_turns_is_not_slept_over():
    """An operation that polls was looked at only a poll interval after its deadline."""
    driver = Driver()
    driver.runner.weights.num_polls = 1000
    driver.send(UpdateWeights(call_id="u", path="w1", timeout_s=0.01))
    driver.turn()
    driver.clock.advance(0.01)
    driver.turn()
    assert driver.wire.last_wait_s == 0
    assert driver.replies["u"].status == 408


@pytest.mark.parametrize("is_seen_before", [False, True], ids=["waiting for idle", "waiting for the store"])
def test_a_flush_of_a_store_that_is_detached_meanwhile_is_owed_to_the_next_one(is_seen_before):
    """It was answered as done, or forgotten, and the old pages were back when the store was attached again."""
    store = UnreliableStore(MemoryMedium(capacity_bytes=1 << 20), seed=0)
    driver = Driver(num_pages=40, num_host_pages=100, backend=store)
    driver.engine.store = store
    prompt = list(range(60))
    driver.finish(driver.generate("a", prompt, 2))
    driver.settle()
    busy = driver.generate("busy", list(range(500, 510)), 20)
    driver.turn()
    if is_seen_before:
        driver.finish(busy)
        driver.settle()
        store.faults.fails = 1.0
    driver.send(FlushCache(call_id="f", tiers=("device", "host", "storage"), timeout_s=5.0))
    driver.turn(3)
    driver.send(DetachStorage(call_id="d"))
    driver.finish(busy)
    for _ in range(1000):
        driver.turn()
        if "f" in driver.replies:
            break
    assert (driver.replies["f"].status, driver.replies["f"].pending) == (202, ("storage",))
    store.faults.fails = 0.0
    driver.send(AttachStorage(call_id="t", kind="memory"))
    driver.turn(5)
    again = driver.generate("b", prompt, 2)
    driver.finish(again)
    assert again.meta.cached_storage == 0


@pytest.mark.parametrize("is_detached", [False, True], ids=["not acknowledged", "detached before it took effect"])
def test_a_flush_is_owed_by_the_store_it_was_meant_for_though_the_next_one_has_carried_it_out(is_detached):
    """Attached again after another one, it had its old pages back."""
    stores = {name: UnreliableStore(MemoryMedium(capacity_bytes=1 << 20), seed=0) for name in ("first", "second")}
    driver = Driver(num_pages=40, num_host_pages=100)
    prompt = list(range(60))

    def attach(name: str) -> None:
        driver.engine.store = stores[name]
        driver.send(AttachStorage(call_id="attach " + name, kind="file", directory=name))
        driver.turn(5)

    attach("first")
    driver.finish(driver.generate("a", prompt, 2))
    driver.settle()
    if is_detached:
        busy = driver.generate("busy", list(range(500, 510)), 20)
        driver.turn()
        driver.send(FlushCache(call_id="f", tiers=("device", "host", "storage"), timeout_s=5.0))
        driver.turn(3)
        driver.send(DetachStorage(call_id="d"))
        driver.finish(busy)
    else:
        stores["first"].faults.fails = 1.0
        driver.send(FlushCache(call_id="f", mode="now", tiers=("device", "host", "storage")))
    while "f" not in driver.replies:
        driver.turn()
    assert driver.replies["f"].pending == ("storage",)
    attach("second")
    stores["first"].faults.fails = 0.0
    attach("first")
    again = driver.generate("b", prompt, 2)
    driver.finish(again)
    assert again.meta.cached_storage == 0


def test_memory_is_not_released_under_a_step_whose_requests_have_ended():
    """Such a step blocks nobody, but it computes: on a GPU its weights and KV were taken away."""
    driver = Driver(is_async=True)
    answer = driver.generate("a", list(range(20)), 200)
    driver.turn(5)
    driver.send(Abort(call_id="end", rid="a"))
    driver.send(ReleaseMemory(call_id="r"))
    driver.turn(2)
    assert answer.finish.type == "abort"
    assert driver.replies["r"].released == ("kv_cache", "weights")


@pytest.mark.parametrize("num_turns", [4, 5])
@pytest.mark.parametrize("output_interval", [1, 1 << 30])
def test_a_rid_that_is_sent_again_in_the_turn_of_its_end_is_refused_and_costs_the_first_nothing(
    output_interval, num_turns
):
    """The end was merged into the refusal: the first lost its tokens, the second its answer."""
    driver = Driver()
    request = Generate(
        rid="a",
        prompt_ids=pack_ids([1, 2, 3]),
        sampling=SamplingParams(max_new_tokens=5, ignore_eos=True),
        output_interval=output_interval,
    )
    driver.send(request)
    driver.turn(num_turns)
    told: list[Output] = []
    driver.answers["a"].take = told.append
    driver.send(request)
    driver.send(request)
    driver.turn(12)
    ends = [output.finish for output in told if output.finish is not None]
    if num_turns == 5:  # it had ended: the next one is a request of its own, the last one is one too many
        assert sorted(end.status for end in ends) == [0, 400]
    else:
        assert sorted(end.status for end in ends) == [0, 400, 400]
    tokens = [token for output in told for token in output.token_ids]
    assert tokens[-5:] == expected([1, 2, 3], 5)[-len(tokens) :]


def test_writing_back_to_a_small_host_comes_to_an_end():
    """Copies pushed out earlier ones, which were made again: never idle, no flush ever came."""
    driver = Driver(num_pages=64, num_host_pages=5, write_policy=WritePolicy.WRITE_BACK)
    for number in range(64):
        driver.finish(driver.generate(f"r{number}", [number + 1, *[3] * 7], 1))
    driver.turn(100)
    for _ in range(4):
        driver.turn()
        assert driver.parts.blockers() == {}


def test_a_label_that_comes_behind_an_abort_counts_only_what_it_ends_itself():
    """The checks took the abort's count for that of the label, which ends nothing while a trainer pauses the engine."""
    driver = Driver()
    driver.generate("a", list(range(20)), 200)
    driver.turn(3)
    driver.send(PauseGeneration(call_id="p", mode="retract"))
    driver.turn()
    driver.send(Abort(call_id="x", match="all"))
    driver.send(SetWeightVersion(call_id="v", weight_version="new"))
    driver.turn()
    assert driver.replies["v"].num_aborted == 0
    driver.finish()


@BOTH
def test_a_part_that_is_copied_in_the_turn_of_a_flush_is_younger_than_the_flush(is_async):
    """The checks took the age of the source for that of the copy, which the flush had not covered."""
    driver = Driver(is_async=is_async, page_size=4, min_part_tokens=1)
    first = [42, 491, 445, 984, 987, *range(100, 126)]
    driver.generate("a", first, 3)
    driver.turn()
    wanted = [*first[:5], 280]
    driver.send(FlushCache(call_id="f", prefix_ids=pack_ids(wanted), hold=True, timeout_s=0.5))
    answer = driver.generate("b", [*wanted, 387], 8)
    driver.finish()
    assert driver.replies["f"].success
    assert answer.finish.type == "length"
    assert driver.parts.scheduler.counters.copied_tokens == 1


def test_a_flush_by_adapter_finds_nothing_when_the_adapter_is_unloaded_before_it_takes_effect():
    """The checks expected another name for the content of an adapter that is not there."""
    driver = Driver()
    driver.send(LoadAdapter(call_id="load", name="lora-c", path="a3"))
    driver.turn(6)
    driver.send(FlushCache(call_id="flush", mode="now", lora_name="lora-c"))
    driver.send(UnloadAdapter(call_id="unload", name="lora-c"))
    driver.turn(2)
    assert driver.replies["flush"].status == 200 and driver.replies["flush"].freed["device"].pages == 0
    driver.finish()


def test_a_request_that_waits_for_a_prefix_may_be_overtaken_in_the_turn_in_which_that_prefix_fails():
    """The check of the order looked at the end of the turn, where nothing computed the prefix any more."""
    driver = Driver(num_pages=64, is_async=True, prefill_chunk_tokens=16)
    prompt = list(range(66))
    first = driver.generate("first", prompt, 5)
    driver.runner.next_fault = "collect"
    driver.turn()
    waiting, other = driver.generate("waiting", prompt, 5), driver.generate("other", list(range(500, 510)), 5)
    driver.turn()
    assert first.finish is not None and first.finish.status == 500
    driver.finish(waiting, other)
