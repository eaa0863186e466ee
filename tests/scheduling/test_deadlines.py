"""Timeouts of the queue and of whole requests, in virtual time."""

import math

from scheduler_steps import Steps


def ends(steps: Steps, *rids: str) -> list[tuple[int, str] | None]:
    found = [steps.finish_of(rid) for rid in rids]
    return [None if finish is None else (finish.status, finish.code) for finish in found]


def test_a_request_that_waits_too_long_ends_with_503_and_the_one_that_runs_does_not():
    steps = Steps(max_running=1, limits={"queue_timeout_s": 2.0})
    steps.add("runs", num_tokens=40)
    steps.step()
    steps.add("waits")
    steps.clock.advance(1.9)
    steps.scheduler.end_overdue()
    assert ends(steps, "runs", "waits") == [None, None]
    steps.clock.advance(0.2)
    steps.scheduler.end_overdue()
    assert ends(steps, "runs", "waits") == [None, (503, "queue_timeout")]
    assert steps.finish_of("waits").retry_after_s >= 1
    assert steps.scheduler.counters.limited_queue_timeout == 1
    steps.finish_all()


def test_a_retracted_request_waits_for_as_long_as_it_takes():
    """It has started: its client has tokens."""
    steps = Steps(limits={"queue_timeout_s": 2.0})
    steps.add("a")
    steps.step()
    steps.scheduler.retract_all()
    steps.clock.advance(10.0)
    steps.scheduler.end_overdue()
    assert ends(steps, "a") == [None]
    steps.finish_all()
    assert steps.finish_of("a").type == "length"


def test_a_request_that_takes_too_long_ends_with_504_running_or_waiting():
    steps = Steps(max_running=1, limits={"request_timeout_s": 2.0})
    steps.add("runs", num_tokens=40)
    steps.step()
    steps.add("waits")
    steps.clock.advance(2.0)
    steps.scheduler.end_overdue()
    assert ends(steps, "runs", "waits") == [(504, "request_timeout")] * 2
    assert steps.scheduler.counters.limited_request_timeout == 2
    assert not steps.scheduler.in_flight()
    assert steps.cache.num_available == steps.cache.pool.capacity, "its pages are cached or free"


def test_the_next_look_is_the_oldest_requests_and_none_without_requests():
    steps = Steps(limits={"queue_timeout_s": 2.0, "request_timeout_s": 5.0})
    deadlines = steps.scheduler.deadlines
    assert deadlines.next_look_s() == math.inf
    steps.add("a", num_tokens=40)
    steps.clock.advance(0.5)
    steps.add("b", num_tokens=40)
    assert deadlines.next_look_s() == 1.5
    steps.step()
    assert deadlines.next_look_s() == 4.5, "both have started"
    steps.scheduler.abort("a", match="exact", message="")
    assert deadlines.next_look_s() == 5.0
    steps.clock.advance(7.0)
    assert deadlines.next_look_s() == 0.0
    steps.scheduler.end_overdue()
    assert deadlines.next_look_s() == math.inf
