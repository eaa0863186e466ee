"""The host tier in the real loop: copies with delays and failures, and what a flush does to them."""

import random

import pytest

from engine_driver import VOCAB_SIZE, Driver, expected
from headwater.cache.host_tier import WritePolicy
from headwater.cache.namespace import Tier
from headwater.messages.control import FlushCache, PauseGeneration
from headwater.messages.generation import Abort

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
POLICIES = pytest.mark.parametrize("policy", list(WritePolicy), ids=[p.value for p in WritePolicy])


def prompt_of(length: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


def run(driver: Driver, rid: str, prompt: list[int], num_tokens: int = 2):
    answer = driver.generate(rid, prompt, num_tokens)
    driver.finish(answer)
    assert answer.tokens == expected(prompt, num_tokens)
    driver.settle()
    return answer


@BOTH
@POLICIES
def test_pages_evicted_from_the_device_are_hit_on_the_host(is_async, policy):
    """A working set of three times the device: each prompt is gone from the device when it comes again."""
    driver = Driver(is_async=is_async, num_pages=24, num_host_pages=200, write_policy=policy, max_copy_polls=4)
    prompts = [prompt_of(60, i) for i in range(5)]
    if policy is WritePolicy.WRITE_THROUGH_SELECTIVE:
        for i, prompt in enumerate(prompts):  # copied once they are hit again
            run(driver, f"first{i}", prompt)
            run(driver, f"again{i}", prompt)
    for lap in range(3):
        answers = [run(driver, f"{lap}-{i}", prompt) for i, prompt in enumerate(prompts)]
    assert all(answer.meta.cached_host >= 40 for answer in answers)
    assert all(answer.meta.cached_host + answer.meta.cached_device <= 56 for answer in answers)


@BOTH
def test_a_request_that_waits_for_pages_blocks_nobody(is_async):
    driver = Driver(is_async=is_async, num_pages=24, num_host_pages=100)
    prompt = prompt_of(60, 1)
    run(driver, "a", prompt)
    run(driver, "b", prompt_of(80, 2))
    driver.copier.max_polls = 1000
    slow = driver.generate("slow", prompt, 2)
    driver.turn(2)
    assert [r.rid for r in driver.parts.scheduler.loading] == ["slow"]
    assert driver.parts.blockers()["loading"] == 1
    quick = driver.generate("quick", prompt_of(10, 3), 3)
    driver.finish(quick)
    assert not slow.tokens
    driver.finish(slow, max_turns=20000)
    assert slow.tokens == expected(prompt, 2)


@BOTH
def test_two_requests_for_the_same_pages_share_one_copy(is_async):
    driver = Driver(is_async=is_async, num_pages=40, num_host_pages=100)
    prompt = prompt_of(60, 1)
    run(driver, "a", prompt)
    run(driver, "b", prompt_of(150, 2))
    driver.copier.max_polls = 30
    first, second = driver.generate("x", prompt, 2), driver.generate("y", prompt, 2)
    driver.turn(3)
    assert driver.parts.blockers()["restore"] == 1
    driver.finish()
    assert first.tokens == second.tokens == expected(prompt, 2)
    assert first.meta.cached_host == second.meta.cached_host > 0


@BOTH
def test_an_abort_while_loading_leaves_nothing_behind(is_async):
    driver = Driver(is_async=is_async, num_pages=24, num_host_pages=100, max_copy_polls=6)
    prompt = prompt_of(60, 1)
    run(driver, "a", prompt)
    run(driver, "b", prompt_of(80, 2))
    driver.copier.max_polls = 50
    gone = driver.generate("gone", prompt, 2)
    driver.turn(2)
    driver.send(Abort(call_id="c", rid="gone"))
    driver.finish(gone)
    driver.settle()
    driver.check_all_pages_back()


@BOTH
def test_a_retracted_request_resumes_from_the_host_instead_of_computing_again(is_async):
    driver = Driver(is_async=is_async, num_pages=24, num_host_pages=200, max_context=90, max_copy_polls=2)
    answers = [driver.generate(f"r{i}", prompt_of(10, i), 40) for i in range(6)]
    driver.finish()
    for i, answer in enumerate(answers):
        assert answer.tokens == expected(prompt_of(10, i), 40)
    counters = driver.parts.scheduler.counters
    assert counters.num_parked > 0
    assert driver.parts.cache.lower.transfers.counters.pages["restore"] > 0


@BOTH
def test_copies_that_fail_cost_a_hit_and_never_a_request(is_async):
    driver = Driver(is_async=is_async, num_pages=24, num_host_pages=100, copy_failure_rate=0.5, max_copy_polls=3)
    for lap in range(3):
        for i in range(5):
            run(driver, f"{lap}-{i}", prompt_of(60, i))
    assert driver.parts.cache.lower.transfers.counters.dropped_pages["copy_failed"] > 0
    driver.check_all_pages_back()


@BOTH
def test_a_restore_that_fails_is_no_hit_on_the_host(is_async):
    """Its request computes these pages; those that were on the device all the time are hits there."""
    driver = Driver(is_async=is_async, num_pages=40, num_host_pages=100)
    prompt = prompt_of(60, 1)
    run(driver, "first", prompt)
    driver.send(FlushCache(call_id="f", mode="now", tiers=("device",)))
    driver.turn()
    run(driver, "again", prompt[:21], 1)
    driver.copier.failure_rate = 1.0
    meta = run(driver, "fails", prompt).meta
    assert driver.parts.cache.lower.transfers.counters.dropped_pages["copy_failed"] > 0
    assert (meta.cached_device, meta.cached_host) == (20, 0)


@BOTH
@pytest.mark.parametrize("num_host_pages", [30, 60])
def test_a_host_that_copies_fill_for_a_while_misses_no_page(is_async, num_host_pages):
    """Offloads that found no room while others were under way were dropped: holes that nothing ever filled."""
    driver = Driver(is_async=is_async, num_pages=120, num_host_pages=num_host_pages)
    driver.copier.max_polls = 40
    prompts = [prompt_of(60, i) for i in range(4)]
    for i, prompt in enumerate(prompts):
        driver.finish(driver.generate(f"r{i}", prompt, 2))
    driver.settle()
    driver.copier.max_polls = 0
    transfers = driver.parts.cache.lower.transfers
    assert "host_full" not in transfers.counters.dropped_pages
    assert transfers.counters.pages["offload"] >= 4 * 15
    driver.send(FlushCache(call_id="f", mode="now", tiers=("device",)))
    driver.turn()
    assert run(driver, "again", prompts[-1]).meta.cached_host == 56
    driver.check_all_pages_back()


def test_a_host_that_is_too_small_says_so():
    """Nothing is under way that could make room: waiting for ever would hide it."""
    driver = Driver(num_pages=120, num_host_pages=4)
    run(driver, "a", prompt_of(60))
    transfers = driver.parts.cache.lower.transfers
    assert transfers.counters.dropped_pages["host_full"] > 0
    assert not transfers._waiting
    driver.check_all_pages_back()


@BOTH
@pytest.mark.parametrize("tiers", [(), ("host",), ("device", "host")])
def test_an_offload_that_waited_for_room_brings_nothing_that_was_flushed_meanwhile(is_async, tiers):
    driver = Driver(is_async=is_async, num_pages=120, num_host_pages=16)
    driver.copier.max_polls = 40
    prompts = [prompt_of(60, i) for i in range(3)]
    for i, prompt in enumerate(prompts):
        driver.finish(driver.generate(f"r{i}", prompt, 2))
    assert driver.parts.cache.lower.transfers._waiting
    driver.send(FlushCache(call_id="f", mode="now", tiers=tiers))
    driver.turn()
    driver.settle()
    assert driver.parts.cache.tier_pages[Tier.HOST].pool.num_free == 16
    for i, prompt in enumerate(prompts):
        assert run(driver, f"again{i}", prompt).meta.cached_host == 0


# --- flush with copies in flight ---------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("tiers", [(), ("host",), ("device", "host")])
def test_an_offload_that_ends_after_its_page_was_retired_does_not_come_back(is_async, tiers):
    """Rule 5: otherwise the flushed pages would be hit again, from the host."""
    driver = Driver(is_async=is_async, num_pages=40, num_host_pages=100, max_copy_polls=0)
    prompt = prompt_of(60, 1)
    driver.copier.max_polls = 500
    answer = driver.generate("a", prompt, 2)
    driver.finish(answer)
    driver.send(FlushCache(call_id="f", mode="now", tiers=tiers))
    driver.turn()
    assert driver.replies["f"].status == 200
    assert driver.parts.blockers()["offload"] > 0, "it ended before the flush"
    driver.settle()
    host = driver.parts.cache.tier_pages[Tier.HOST]
    assert host.pool.num_free == 100
    again = driver.generate("b", prompt, 2)
    driver.finish(again)
    assert again.meta.cached_host == 0
    assert again.tokens == expected(prompt, 2)
    if tiers != ("host",):
        assert again.meta.cached_device == 0


@BOTH
def test_a_restore_that_was_retired_is_dropped_and_the_request_computes(is_async):
    driver = Driver(is_async=is_async, num_pages=24, num_host_pages=100)
    prompt = prompt_of(60, 1)
    run(driver, "a", prompt)
    run(driver, "b", prompt_of(80, 2))
    driver.copier.max_polls = 100
    answer = driver.generate("c", prompt, 2)
    driver.turn(2)
    assert driver.parts.scheduler.loading
    driver.send(FlushCache(call_id="f", mode="now"))
    driver.finish(answer)
    assert (answer.meta.cached_host, answer.meta.cached_device) == (0, 0)
    assert answer.tokens == expected(prompt, 2)
    driver.settle()
    driver.check_all_pages_back()


def test_periodic_flushes_cannot_starve_a_loading_request():
    driver = Driver(num_pages=24, num_host_pages=200)
    prompt = prompt_of(60, 1)
    run(driver, "a", prompt)
    run(driver, "b", prompt_of(80, 2))
    driver.copier.max_polls = 50
    answer = driver.generate("c", prompt, 2)
    for turn in range(400):
        driver.send(FlushCache(call_id=f"f{turn}", mode="now", tiers=("device",)))
        driver.turn()
        if answer.finish:
            break
    assert answer.tokens == expected(prompt, 2)


def test_flushing_the_device_alone_leaves_the_host_warm_and_says_so():
    driver = Driver(num_pages=40, num_host_pages=100)
    prompt = prompt_of(60, 1)
    run(driver, "a", prompt)
    driver.send(FlushCache(call_id="f", tiers=("device",)))
    driver.turn()
    assert driver.replies["f"].still_warm == ("host",)
    answer = run(driver, "b", prompt)
    assert answer.meta.cached_host == 56 and answer.meta.cached_device == 0


def test_flushing_all_tiers_leaves_nothing_and_counts_each():
    driver = Driver(num_pages=40, num_host_pages=100)
    prompt = prompt_of(60, 1)
    run(driver, "a", prompt)
    driver.send(FlushCache(call_id="dry", dry_run=True))
    driver.send(FlushCache(call_id="f"))
    driver.turn()
    done = driver.replies["f"]
    assert done.freed == driver.replies["dry"].freed
    assert done.freed["device"].pages == done.freed["host"].pages == 15
    assert run(driver, "b", prompt).meta.cached_host == 0


@BOTH
def test_copies_end_while_paused(is_async):
    """Rule 10: a paused loop that reads no completions could never be flushed."""
    driver = Driver(is_async=is_async, num_pages=40, num_host_pages=100)
    driver.copier.max_polls = 20
    driver.generate("a", prompt_of(60, 1), 50)
    driver.turn(4)
    driver.send(PauseGeneration(call_id="p", mode="retract"))
    driver.send(FlushCache(call_id="f", timeout_s=30.0))
    for _ in range(200):
        driver.turn()
        if "f" in driver.replies:
            break
    assert driver.replies["f"].status == 200


@pytest.mark.parametrize("policy", list(WritePolicy))
def test_the_120_turns_of_the_original_report_with_a_host_tier(policy):
    """With timeout=10 no answer other than 200; without, every refusal names the copy that blocks."""
    driver = Driver(num_pages=700, page_size=16, num_host_pages=2000, max_step_tokens=1024, prefill_chunk_tokens=512)
    driver.copier.max_polls = 5
    for turn in range(60):
        answer = driver.generate(f"r{turn}", prompt_of(2200, turn), 2)
        driver.finish(answer)
        for second in (0, 1):
            driver.send(FlushCache(call_id=f"now{turn}-{second}"))
            driver.send(FlushCache(call_id=f"wait{turn}-{second}", timeout_s=10.0))
            while f"wait{turn}-{second}" not in driver.replies:
                driver.turn()
            assert driver.replies[f"wait{turn}-{second}"].status == 200
            refused = driver.replies[f"now{turn}-{second}"]
            assert refused.status == 200 or set(refused.blockers) == {"offload"}
