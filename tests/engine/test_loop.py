"""The loop around a fake runner whose text depends on every page it reads."""

import random

import pytest

from engine_driver import VOCAB_SIZE, Driver, expected
from headwater.messages.base import pack_ids
from headwater.messages.control import Done
from headwater.messages.generation import Abort, Finish, Generate, GenerateBatch, LogprobParams, SamplingParams
from headwater.messages.state import EngineReady, EngineState, GetState, Hello, Ping, Shutdown

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def prompt_of(length: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(length)]


@BOTH
@pytest.mark.parametrize("length", [1, 3, 4, 5, 31, 32, 33, 150])
def test_text_is_the_same_however_the_prompt_is_chunked(is_async, length):
    driver = Driver(is_async=is_async)
    prompt = prompt_of(length)
    answer = driver.generate("a", prompt, 9)
    driver.finish()
    assert answer.tokens == expected(prompt, 9)
    assert answer.finish.type == "length"
    driver.settle()
    driver.check_all_pages_back()


@BOTH
@pytest.mark.parametrize(("interval", "num_outputs"), [(1, 9), (4, 3), (100, 2)])
def test_tokens_come_at_the_interval_asked_for_and_none_is_lost(is_async, interval, num_outputs):
    """Who does not stream needs no message for every token; each costs engine and client a slice of a step."""
    driver = Driver(is_async=is_async)
    answer = driver.generate("a", prompt_of(20), 9, output_interval=interval, logprobs=LogprobParams())
    taken = []
    take, answer.take = answer.take, lambda output: (taken.append(output), take(output))
    driver.finish()
    assert answer.tokens == expected(prompt_of(20), 9)
    assert len(answer.logprobs) == 9
    assert len(taken) == num_outputs
    assert taken[0].token_ids == (answer.tokens[0],), "the first token tells how long it took"


@BOTH
def test_tokens_held_back_arrive_when_the_request_is_aborted_or_retracted(is_async):
    driver = Driver(is_async=is_async, num_pages=24, max_context=90)
    answers = [driver.generate(f"r{i}", prompt_of(10, i), 40, output_interval=1000) for i in range(6)]
    driver.finish(*answers[:5])
    assert driver.parts.scheduler.counters.num_retractions > 0
    for i, answer in enumerate(answers[:5]):
        assert answer.tokens == expected(prompt_of(10, i), 40)
    late = driver.generate("late", prompt_of(10, 9), 40, output_interval=1000)
    driver.turn(12)
    driver.send(Abort(call_id="x", rid="late"))
    driver.finish()
    assert 1 < len(late.tokens) < 40
    assert late.tokens == expected(prompt_of(10, 9), 40)[: len(late.tokens)]


@BOTH
def test_requests_in_one_batch_do_not_disturb_each_other(is_async):
    driver = Driver(is_async=is_async, num_pages=256)
    answers = {n: driver.generate(f"r{n}", prompt_of(5 + 7 * n, n), 3 + n) for n in range(12)}
    driver.finish()
    for n, answer in answers.items():
        assert answer.tokens == expected(prompt_of(5 + 7 * n, n), 3 + n)


@BOTH
def test_a_second_request_finds_the_pages_of_the_first(is_async):
    driver = Driver(is_async=is_async)
    prompt = prompt_of(40)
    driver.generate("a", prompt, 4)
    driver.finish()
    again = driver.generate("b", prompt, 4)
    longer = driver.generate("c", prompt + prompt_of(5, 9), 4)
    driver.finish()
    assert again.meta.cached_device == 36  # the last token is always computed, so not its page
    assert longer.meta.cached_device == 40
    assert again.tokens == expected(prompt, 4)
    assert longer.tokens == expected(prompt + prompt_of(5, 9), 4)


@BOTH
def test_prefix_is_shared_while_its_first_user_still_runs(is_async):
    driver = Driver(is_async=is_async, num_pages=128)
    prompt = prompt_of(120)
    answers = [driver.generate(f"r{i}", [*prompt, i], 30) for i in range(4)]
    driver.finish()
    assert answers[0].meta.cached_device == 0
    assert all(a.meta.cached_device >= 64 for a in answers[1:])  # the rest is not worth a wait
    for i, answer in enumerate(answers):
        assert answer.tokens == expected([*prompt, i], 30)


@BOTH
def test_namespaces_never_share_pages(is_async):
    driver = Driver(is_async=is_async)
    prompt = prompt_of(40)
    driver.generate("a", prompt, 2, cache_salt="tenant-a")
    driver.finish()
    other = driver.generate("b", prompt, 2, cache_salt="tenant-b")
    key = driver.generate("c", prompt, 2, cache_salt="tenant-a", extra_key="k")
    same = driver.generate("d", prompt, 2, cache_salt="tenant-a")
    driver.finish()
    assert (other.meta.cached_device, key.meta.cached_device, same.meta.cached_device) == (0, 0, 36)


@BOTH
def test_no_store_leaves_nothing_behind(is_async):
    driver = Driver(is_async=is_async)
    prompt = prompt_of(40)
    driver.generate("a", prompt, 2, no_store=True)
    driver.finish()
    later = driver.generate("b", prompt, 2)
    driver.finish()
    assert later.meta.cached_device == 0


@BOTH
def test_retracted_requests_continue_with_the_same_text(is_async):
    """Six requests that together need three times the pool: pages run out again and again."""
    driver = Driver(is_async=is_async, num_pages=24, max_context=90)
    answers = [driver.generate(f"r{i}", prompt_of(10, i), 40) for i in range(6)]
    driver.finish()
    for i, answer in enumerate(answers):
        assert answer.tokens == expected(prompt_of(10, i), 40)
    assert driver.parts.scheduler.counters.num_retractions > 0
    driver.settle()
    driver.check_all_pages_back()


@BOTH
def test_eviction_takes_the_least_recently_used(is_async):
    driver = Driver(is_async=is_async, num_pages=24)
    old, kept, new = prompt_of(32, 1), prompt_of(32, 2), prompt_of(40, 3)
    for rid, prompt in (("old", old), ("kept", kept), ("touch", kept), ("new", new)):
        driver.generate(rid, prompt, 1)
        driver.finish()
    assert driver.generate("k2", kept, 1) and driver.finish() is None
    assert driver.answers["k2"].meta.cached_device == 28
    driver.generate("o2", old, 1)
    driver.finish()
    assert driver.answers["o2"].meta.cached_device < 28


@BOTH
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8])
def test_abort_at_any_point_gives_everything_back(is_async, turns):
    driver = Driver(is_async=is_async, num_pages=40)
    answer = driver.generate("gone", prompt_of(100), 20)
    other = driver.generate("stays", prompt_of(20, 5), 20)
    driver.turn(turns)
    driver.send(Abort(call_id="c", rid="gone"))
    driver.finish()
    driver.settle()
    assert answer.finish.type == "abort"
    assert other.tokens == expected(prompt_of(20, 5), 20)
    assert isinstance(driver.replies["c"], Done)
    driver.check_all_pages_back()


def test_abort_by_prefix_and_all_and_unknown():
    driver = Driver()
    for rid in ("job-1", "job-2", "other"):
        driver.generate(rid, prompt_of(10), 50)
    driver.turn()
    driver.send(Abort(call_id="1", rid="job-", match="prefix"))
    driver.send(Abort(call_id="2", rid="nobody"))
    driver.turn()
    assert [driver.answers[r].finish is not None for r in ("job-1", "job-2", "other")] == [True, True, False]
    driver.send(Abort(call_id="3", match="all"))
    driver.turn()
    assert driver.answers["other"].finish.type == "abort"
    assert set(driver.replies) == {"1", "2", "3"}


@BOTH
def test_stop_tokens_end_generation_and_min_new_tokens_postpones_them(is_async):
    prompt = prompt_of(12)
    text = expected(prompt, 30)
    stop = text[10]
    first = text.index(stop)
    driver = Driver(is_async=is_async, eos_token_ids=(stop,))
    ends = driver.generate("ends", prompt, 30)
    ignores = driver.generate("ignores", prompt, 30, ignore_eos=True)
    given = driver.generate("given", prompt, 30, ignore_eos=True, stop_token_ids=(text[3],))
    driver.finish()
    assert ends.tokens == text[: first + 1] and ends.finish.type == "stop" and ends.finish.matched == stop
    assert ignores.tokens == text and ignores.finish.type == "length"
    assert given.tokens == text[: text.index(text[3]) + 1]


@BOTH
def test_zero_new_tokens_computes_the_prompt_and_caches_it(is_async):
    driver = Driver(is_async=is_async)
    prompt = prompt_of(50)
    answer = driver.generate("a", prompt, 0)
    driver.finish()
    assert answer.tokens == [] and answer.finish.type == "length"
    later = driver.generate("b", prompt, 3)
    driver.finish()
    assert later.meta.cached_device == 48
    assert later.tokens == expected(prompt, 3)


@BOTH
def test_more_tokens_than_fit_are_cut_to_the_context(is_async):
    driver = Driver(is_async=is_async, max_context=30, num_pages=64)
    answer = driver.generate("a", prompt_of(20), 1000)
    driver.finish()
    assert answer.tokens == expected(prompt_of(20), 10) and answer.finish.type == "length"


def test_a_prompt_that_can_never_run_is_refused_with_its_numbers():
    driver = Driver(max_context=4096, num_pages=8)
    answer = driver.generate("a", prompt_of(40), 1)
    driver.turn()
    assert answer.finish.status == 400 and "40 tokens" in answer.finish.message


def test_a_full_queue_refuses_with_429():
    driver = Driver(max_running=1, max_queued=2)
    driver.generate("r0", prompt_of(8), 50)
    driver.turn()
    for i in (1, 2, 3):
        driver.generate(f"r{i}", prompt_of(8), 1)
    driver.turn()
    assert driver.answers["r3"].finish.status == 429
    driver.finish()
    assert driver.answers["r2"].finish.type == "length"


def test_clients_may_use_the_same_rid():
    """Two API processes do not know of each other's ids; a rid that one client uses twice is refused."""
    driver = Driver()
    message = Generate(rid="same", prompt_ids=pack_ids(prompt_of(8)), sampling=SamplingParams(max_new_tokens=3))
    for client in (b"one", b"two", b"two"):
        driver.wire.inbound.append((client, message))
    ends: dict[bytes, list[Finish]] = {b"one": [], b"two": []}
    for _ in range(10):
        driver.parts.loop.turn()
        for client, sent in driver.wire.sent:
            ends[client] += [output.finish for output in sent.items if output.finish]
        driver.wire.sent = []
    assert [finish.type for finish in ends[b"one"]] == ["length"]
    assert [finish.status for finish in ends[b"two"] if finish.type == "abort"] == [400]


def test_requests_in_one_message_begin_in_one_step():
    driver = Driver()
    sampling = SamplingParams(max_new_tokens=1)
    items = [Generate(rid=f"r{n}", prompt_ids=pack_ids(prompt_of(8, n)), sampling=sampling) for n in range(3)]
    refused = Generate(rid="long", prompt_ids=pack_ids(prompt_of(100_000)), sampling=sampling)
    driver.wire.inbound.append((b"one", GenerateBatch(items=(*items, refused))))
    driver.parts.loop.turn()
    outputs = [output for _, sent in driver.wire.sent for output in sent.items]
    assert driver.runner.num_steps == 1
    assert {output.rid: output.finish.type for output in outputs} == {
        "r0": "length", "r1": "length", "r2": "length", "long": "abort",
    }  # fmt: skip


def test_higher_priority_is_served_first():
    driver = Driver(max_running=1)
    first = driver.generate("first", prompt_of(8, 1), 5)
    low = driver.generate("low", prompt_of(8, 2), 5, priority=0)
    high = driver.generate("high", prompt_of(8, 3), 5, priority=5)
    driver.finish(high)
    assert low.finish is None
    driver.finish(first, low)


def test_longest_prefix_match_goes_first_when_asked_for():
    driver = Driver(max_running=1, policy="lpm")
    shared = prompt_of(40, 1)
    driver.generate("warm", shared, 1)
    driver.finish()
    driver.generate("busy", prompt_of(8, 4), 3)
    driver.turn()
    cold = driver.generate("cold", prompt_of(40, 2), 3)
    warm = driver.generate("hit", [*shared, 1], 3)
    driver.finish(warm)
    assert cold.finish is None
    driver.finish()


@BOTH
def test_prompt_logprobs_cover_the_positions_asked_for(is_async):
    driver = Driver(is_async=is_async)
    prompt = prompt_of(70)
    driver.generate("warm", prompt, 1)
    driver.finish()
    whole = driver.generate("whole", prompt, 2, logprobs=LogprobParams(prompt_start=0))
    tail = driver.generate("tail", prompt, 2, logprobs=LogprobParams(prompt_start=50))
    driver.finish()
    assert [p.token_id for p in whole.prompt_logprobs] == prompt
    assert whole.prompt_logprobs[0].logprob is None and whole.meta.cached_device == 0
    assert [p.token_id for p in tail.prompt_logprobs] == prompt[50:]
    assert tail.meta.cached_device == 48
    assert [p.token_id for p in tail.logprobs] == tail.tokens


def test_every_call_is_answered():
    driver = Driver()
    for message in (Hello(call_id="h"), Ping(call_id="p"), GetState(call_id="s"), Shutdown(call_id="x")):
        driver.send(message)
    driver.turn()
    assert isinstance(driver.replies["h"], EngineReady)
    assert isinstance(driver.replies["p"], Done)
    state = driver.replies["s"]
    assert isinstance(state, EngineState) and state.tiers["device"].free == 64
    assert isinstance(driver.replies["x"], Done)


def test_shutdown_tells_running_requests():
    driver = Driver()
    answer = driver.generate("a", prompt_of(10), 500)
    driver.turn(3)
    driver.send(Shutdown(call_id="x"))
    driver.parts.loop.run()
    driver._read()
    assert answer.finish.type == "abort" and "shutting down" in answer.finish.message


def test_an_idle_loop_sleeps_and_a_busy_one_does_not():
    driver = Driver()
    driver.turn(2)
    assert driver.wire.last_wait_s > 0
    driver.generate("a", prompt_of(10), 5)
    driver.turn(2)
    assert driver.wire.last_wait_s == 0


def test_a_loop_that_has_been_idle_for_two_seconds_calls_once():
    """Not while anything runs, so the work that it begins delays no answer."""
    driver, calls = Driver(), []
    loop, clock = driver.parts.loop, driver.clock
    loop.call_when_idle(lambda: calls.append(clock.now()))
    driver.generate("a", prompt_of(10), 40)
    began_s = clock.now()
    driver.wire.on_receive = lambda wait_s, received: loop.stop() if clock.now() - began_s > 60 else clock.advance(1.0)
    loop.run()
    driver._read()
    assert len(driver.answers["a"].tokens) == 40
    (called_s,) = calls
    assert 42 <= called_s - began_s < 50, "forty steps of a second, then two idle seconds"


@BOTH
@pytest.mark.parametrize("seed", range(12))
def test_random_requests_in_a_small_pool_give_the_right_text(is_async, seed):
    """Shared prefixes, chunks, retractions and aborts in any order: the text is that of the tokens alone."""
    source = random.Random(seed)
    driver = Driver(is_async=is_async, num_pages=source.choice([20, 40, 80]), max_context=70, max_running=5)
    stems = [prompt_of(24, 100 + i) for i in range(3)]
    wanted: dict[str, tuple[list[int], int]] = {}
    for i in range(40):
        prompt = source.choice(stems)[: source.randrange(1, 25)] + prompt_of(source.randrange(8), i)
        num_tokens = source.randrange(0, 25)
        driver.generate(f"r{i}", prompt, num_tokens, no_store=source.random() < 0.1)
        wanted[f"r{i}"] = (prompt, num_tokens)
        driver.turn(source.randrange(3))
        if source.random() < 0.15:
            driver.send(Abort(call_id=f"c{i}", rid=f"r{source.randrange(i + 1)}"))
    driver.finish()
    driver.settle()
    for rid, (prompt, num_tokens) in wanted.items():
        answer = driver.answers[rid]
        full = expected(prompt, num_tokens)
        if answer.finish.type == "abort":
            assert answer.tokens == full[: len(answer.tokens)]
        else:
            assert answer.tokens == full
    driver.check_all_pages_back()
