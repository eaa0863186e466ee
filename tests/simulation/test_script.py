"""Scripted runs: the interleavings that went wrong elsewhere, one turn after the other."""

import pytest
from script import Script, Turns, run_script

from headwater.cache.host_tier import WritePolicy
from headwater.simulation.checks.violation import Violation
from headwater.simulation.engine_shape import EngineShape

PROMPT = list(range(100, 140))
BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@BOTH
@pytest.mark.parametrize("mode", ["now", "drain"])
def test_a_flush_between_two_chunks_of_a_prompt(is_async, mode):
    def script(s: Script) -> Turns:
        answer = s.start("a", PROMPT, 4)
        yield from s.to_chunk("a", 2)
        call = s.flush(mode=mode, timeout_s=10.0)
        yield from s.answer_of(call)
        assert s.reply(call).status == 200
        assert bool(answer.finish) == (mode == "drain")  # a drain waits for the pages of its first chunks
        yield from s.end_of(answer)
        later = s.start("b", PROMPT, 4)
        yield from s.end_of(later)
        assert later.meta.cached_device == 0 and later.tokens == answer.tokens

    run_script(script, EngineShape(prefill_chunk_tokens=8, is_async=is_async))


@BOTH
def test_pages_of_after_a_flush_are_shared_with_who_started_before_it(is_async):
    """The old request meets the new one's pages when it publishes: it may not bring its own into the tree."""

    def script(s: Script) -> Turns:
        old = s.start("old", PROMPT, 40)
        yield from s.to_token(old, 2)
        s.flush(mode="now")
        yield
        new = s.start("new", PROMPT, 4)
        yield from s.end_of(new)
        assert new.meta.cached_device == 0
        third = s.start("third", PROMPT, 4)
        yield from s.end_of(third)
        assert third.meta.cached_device == 36
        yield from s.end_of(old)

    run_script(script, EngineShape(is_async=is_async))


@BOTH
@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_new_weights_in_the_middle_of_a_pause(is_async, mode):
    def script(s: Script) -> Turns:
        answer = s.start("a", PROMPT, 20)
        yield from s.to_token(answer, 5)
        paused = s.pause(mode)
        updated = s.update_weights("w1")
        yield from s.answer_of(paused)
        yield from s.answer_of(updated)
        num_tokens = len(answer.tokens)
        yield
        yield
        assert len(answer.tokens) == num_tokens
        s.resume()
        yield from s.end_of(answer)
        assert answer.meta.weights_versions
        again = s.start("b", PROMPT, 2)
        yield from s.end_of(again)
        assert (again.meta.cached_device > 0) == (mode == "retract")  # computed anew, and published, or not

    run_script(script, EngineShape(is_async=is_async))


@BOTH
def test_a_flush_of_the_host_while_pages_are_on_their_way_there(is_async):
    """The offload ends after the flush; what it brings must not be matched on the host."""

    def script(s: Script) -> Turns:
        s.driver.copier.max_polls = 0
        answer = s.start("a", PROMPT, 2)
        yield from s.until(lambda: bool(s.driver.copier.open_copies))
        s.driver.copier.open_copies[0].delay(30)
        call = s.flush(mode="now", tiers=("host",))
        yield
        assert s.reply(call).status == 200
        yield from s.end_of(answer)
        yield from s.quiet()
        for number in range(4):  # push it off the device
            yield from s.end_of(s.start(f"other{number}", list(range(number * 50, number * 50 + 60)), 2))
        again = s.start("again", PROMPT, 2)
        yield from s.end_of(again)
        assert again.meta.cached_host < 36

    run_script(script, EngineShape(num_pages=24, num_host_pages=200, is_async=is_async))


def test_a_request_that_is_parked_comes_back_with_the_same_text():
    def script(s: Script) -> Turns:
        first = s.start("first", PROMPT, 30)
        second = s.start("second", list(range(40)), 30)
        yield from s.end_of(first, second)
        assert second.meta.num_retractions > 0

    shape = EngineShape(num_pages=26, num_host_pages=100, write_policy=WritePolicy.WRITE_BACK, max_copy_polls=3)
    run_script(script, shape)


def test_memory_is_released_between_two_requests_and_nothing_of_it_is_read_again():
    def script(s: Script) -> Turns:
        yield from s.end_of(s.start("a", PROMPT, 4))
        yield from s.quiet()
        released = s.release_memory(tags=("kv_cache",))
        yield from s.answer_of(released)
        waiting = s.start("b", PROMPT, 4)
        yield
        assert not waiting.tokens
        s.resume_memory()
        yield from s.end_of(waiting)
        assert waiting.meta.cached_device == 0

    run_script(script)


def test_an_abort_in_the_turn_of_the_last_token_is_answered_once():
    def script(s: Script) -> Turns:
        answer = s.start("a", PROMPT, 3)
        yield from s.to_token(answer, 2)
        call = s.abort("a")
        yield
        assert s.reply(call) and answer.finish.type == "abort"

    run_script(script)


def test_a_script_that_waits_in_vain_says_for_what():
    def script(s: Script) -> Turns:
        s.start("a", PROMPT, 2)
        yield from s.until(lambda: False, "a sign")

    with pytest.raises(Violation, match="a sign"):
        run_script(script)


def test_a_wrong_page_shows():
    """The oracle is no oracle if it does not notice."""

    def script(s: Script) -> Turns:
        answer = s.start("a", PROMPT, 20)
        yield from s.to_token(answer, 2)
        lease = next(iter(s.driver.parts.scheduler.running)).lease
        s.driver.runner.kv["canary"][lease.page_table()[3], 1] ^= 1
        yield from s.end_of(answer)

    with pytest.raises(Violation, match="kv_is_its_own: a reads KV at position 13"):
        run_script(script)
