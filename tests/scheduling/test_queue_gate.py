"""The bounds of the queue, and the time after which a refused client should try again."""

import pytest
from scheduler_steps import Steps

from headwater.scheduling.queue_gate import MAX_RETRY_S


def refusal(steps: Steps, rid: str):
    finish = steps.finish_of(rid)
    return None if finish is None else (finish.status, finish.code)


FULL = (429, "queue_full")


def test_waiting_tokens_are_bounded_and_free_again_when_their_request_leaves():
    steps = Steps(limits={"max_queued_tokens": 20})
    for rid, num_tokens in (("a", 12), ("b", 8), ("c", 1)):
        steps.add(rid, num_tokens)
    assert [refusal(steps, rid) for rid in "abc"] == [None, None, FULL]
    assert steps.scheduler.counters.limited_queued_tokens == steps.scheduler.counters.num_refused == 1
    steps.scheduler.abort("a", match="exact", message="")
    steps.add("d", 12)
    assert refusal(steps, "d") is None
    steps.finish_all()
    assert steps.scheduler.waiting.held == (0, 0)


def test_a_prompt_over_the_bound_may_wait_alone():
    """Else it would get 429 for ever, although it can run."""
    steps = Steps(limits={"max_queued_tokens": 4})
    steps.add("long", 30)
    steps.add("b", 1)
    assert [refusal(steps, rid) for rid in ("long", "b")] == [None, FULL]


def test_tokens_of_a_retracted_request_count_while_it_waits_again():
    steps = Steps(limits={"max_queued_tokens": 20})
    steps.add("a", 12)
    steps.step()
    assert steps.scheduler.waiting.held == (0, 0)
    steps.scheduler.retract_all()
    assert steps.scheduler.waiting.held == (1, 13), "its prompt and one generated token"
    steps.finish_all()
    assert steps.scheduler.waiting.held == (0, 0)


def test_one_key_cannot_fill_the_queue():
    steps = Steps(max_queued=4, limits={"max_queue_share": 0.5})
    for rid in ("a1", "a2", "a3"):
        steps.add(rid, account=1)
    for rid in ("b1", "b2"):
        steps.add(rid, account=2)
    assert [refusal(steps, rid) for rid in ("a1", "a2", "a3", "b1", "b2")] == [None, None, FULL, None, None]
    assert steps.scheduler.counters.limited_queue_share == 1


def test_a_share_is_of_the_tokens_also_and_never_less_than_one_request():
    steps = Steps(max_queued=4, limits={"max_queue_share": 0.1, "max_queued_tokens": 100})
    steps.add("a1", 50, account=1)
    steps.add("a2", 1, account=1)
    steps.add("b1", 1, account=2)
    assert [refusal(steps, rid) for rid in ("a1", "a2", "b1")] == [None, FULL, None]


@pytest.mark.parametrize(("interval_s", "retry_after_s"), [(0.1, 1), (2.0, 2), (30.0, 30), (500.0, MAX_RETRY_S)])
def test_the_time_to_try_again_follows_from_the_newest_starts(interval_s: float, retry_after_s: int):
    """One place in a full queue is free when one request starts."""
    steps = Steps(max_queued=1, max_running=1)
    for number in range(3):
        steps.add(f"r{number}", num_tokens=1)
        steps.step()
        steps.clock.advance(interval_s)
    steps.add("waits")
    steps.add("refused")
    assert steps.finish_of("refused").retry_after_s == retry_after_s


def test_without_any_start_the_longest_time_is_given():
    steps = Steps(max_queued=1)
    steps.add("waits")
    steps.add("refused")
    assert steps.finish_of("refused").retry_after_s == MAX_RETRY_S


def test_tokens_over_the_bound_take_their_own_time():
    steps = Steps(max_running=1, limits={"max_queued_tokens": 20})
    steps.add("r0", 10, num_tokens=1)
    steps.step()
    steps.clock.advance(5.0)
    steps.add("waits", 16)
    steps.add("refused", 14)
    assert steps.finish_of("refused").retry_after_s == 5, "10 tokens too many, of which 10 leave in 5 s"
