"""What a step brought: tokens, ends, pages to the tree, and results that come too late."""

import numpy as np
import pytest
from scheduler_steps import PAGE, Steps, request

from headwater.cache.invariants import check_invariants
from headwater.messages.generation import LogprobParams, TokenLogprob
from headwater.scheduling.plan import StepResult
from headwater.scheduling.scheduler import _MIN_PREFILL_SAMPLE


def num_cached_of(steps: Steps, num_prompt_tokens: int, first_id: int = 0) -> int:
    """How many tokens of such a prompt a new request would find."""
    one = request("probe", num_prompt_tokens, first_id=first_id)
    return steps.cache.peek(one.namespace("w"), one.tokens.view())


def test_full_pages_are_found_after_each_chunk_has_been_collected():
    steps = Steps(prefill_chunk_tokens=6)
    steps.add("a", 12)
    plan = steps.plan()
    assert num_cached_of(steps, 12) == 0
    steps.collect(plan)
    assert num_cached_of(steps, 12) == PAGE
    steps.step()
    assert num_cached_of(steps, 12) == 12


def test_generated_tokens_are_found_after_the_end():
    steps = Steps()
    steps.add("a", 6, 3)
    steps.finish_all()
    check_invariants(steps.cache)
    # 6 + 3 tokens; the last one was never computed: two full pages
    assert num_cached_of(steps, 6) == PAGE
    assert steps.num_free_pages == 64


@pytest.mark.parametrize("min_new_tokens", [0, 1, 2])
def test_a_stop_token_ends_the_text_and_is_named(min_new_tokens):
    steps = Steps(eos=(7,))
    steps.add("a", 4, 10, min_new_tokens=min_new_tokens)
    for _ in range(min_new_tokens + 1):
        assert steps.finish_of("a") is None
        steps.step(token=7)
    finish = steps.finish_of("a")
    assert (finish.type, finish.matched) == ("stop", 7)
    assert steps.tokens_of("a") == [7] * (min_new_tokens + 1)


def test_the_last_token_ends_by_length_unless_it_stops():
    steps = Steps(eos=(7,))
    steps.add("a", 4, 1)
    steps.add("b", 4, 1, first_id=50)
    plan = steps.plan()
    tokens = np.array([7, 8], dtype=np.int32)
    finite = np.ones(2, dtype=np.bool_)
    steps.scheduler.collect(plan, StepResult(plan.step_id, plan.slots, plan.uses, tokens, finite))
    assert steps.finish_of("a").type == "stop"
    assert steps.finish_of("b").type == "length"


def test_a_row_that_is_not_finite_fails_alone_with_500():
    steps = Steps()
    steps.add("good", 4)
    steps.add("bad", 4, first_id=50)
    steps.collect(steps.plan(), not_finite=(1,))
    finish = steps.finish_of("bad")
    assert (finish.type, finish.status) == ("abort", 500)
    assert steps.tokens_of("bad") == []
    assert steps.finish_of("good") is None
    steps.finish_all()
    assert steps.num_free_pages == 64


def test_a_result_for_a_slot_that_has_changed_hands_is_dropped():
    """The step launched ahead computes one more token for a request that the step before it ended."""
    steps = Steps(max_running=1, eos=(7,))
    steps.add("a", 4, 10)
    steps.add("b", 4, 10, first_id=50)
    first, ahead = steps.plan(), steps.plan()
    steps.collect(first, token=7)
    assert steps.finish_of("a").type == "stop"
    of_b = steps.plan()
    assert of_b.slots.tolist() == ahead.slots.tolist()
    steps.collect(ahead, token=8)
    assert steps.tokens_of("b") == []
    assert steps.tokens_of("a") == [7]
    steps.collect(of_b, token=9)
    assert steps.tokens_of("b") == [9]


def test_pages_are_free_only_when_no_step_in_flight_uses_them():
    steps = Steps(num_pages=16, eos=(7,))
    steps.add("a", 6, 10, no_store=True)
    first, ahead = steps.plan(), steps.plan()
    steps.collect(first, token=7)
    assert steps.num_free_pages < 16
    steps.collect(ahead)
    assert steps.num_free_pages == 16
    check_invariants(steps.cache)


def test_a_step_that_raises_ends_its_requests_and_publishes_nothing_of_itself():
    steps = Steps(num_pages=32)
    steps.add("old", 6, 10)
    steps.step()
    steps.add("new", 8, 10, first_id=50)
    plan = steps.plan()
    steps.add("waits", 8, 2, first_id=90)
    assert steps.scheduler.fail(plan, RuntimeError("boom")) == 2
    for rid in ("old", "new"):
        finish = steps.finish_of(rid)
        assert (finish.type, finish.status, finish.err_type) == ("abort", 500, "engine_error")
        assert "boom" in finish.message
    assert num_cached_of(steps, 8, first_id=50) == 0
    assert num_cached_of(steps, 6) == PAGE
    assert (steps.scheduler.counters.num_failed, steps.scheduler.counters.num_failed_steps) == (2, 1)
    steps.finish_all()
    assert steps.finish_of("waits").type == "length"
    assert steps.num_free_pages == 32
    check_invariants(steps.cache)


def test_a_failed_step_spares_who_left_before_it_was_known():
    steps = Steps(max_running=1, eos=(7,))
    steps.add("a", 4, 10)
    steps.add("b", 4, 2, first_id=50)
    first, ahead = steps.plan(), steps.plan()
    steps.collect(first, token=7)
    of_b = steps.plan()
    assert steps.scheduler.fail(ahead, RuntimeError("boom")) == 0
    steps.collect(of_b)
    steps.finish_all()
    assert steps.finish_of("a").type == "stop"
    assert steps.finish_of("b").type == "length"


def test_facts_come_with_the_first_and_with_the_last_output():
    steps = Steps(weight_version="v1")
    steps.add("first", 8, 1)
    steps.finish_all()
    steps.clock.advance(5.0)
    steps.add("a", 10, 3)
    steps.clock.advance(2.0)
    steps.finish_all()
    metas = [output.meta for output in steps.said("a")]
    assert [meta is not None for meta in metas] == [True, False, True]
    for meta in (metas[0], metas[-1]):
        assert (meta.prompt_tokens, meta.cached_device, meta.weight_version) == (10, 8, "v1")
        assert meta.queue_time_s == pytest.approx(2.0)


def test_prompt_logprobs_gather_over_chunks_and_start_with_the_one_that_nothing_predicts():
    steps = Steps(prefill_chunk_tokens=3)
    steps.add("a", 5, 1, logprobs=LogprobParams(prompt_start=0))
    for positions in ((1, 2, 3), (4,)):
        plan = steps.plan()
        known = {0: tuple(TokenLogprob(token_id=p, logprob=-1.0) for p in positions)}
        tokens = np.where(plan.samples, 9, -1).astype(np.int32)
        result = StepResult(plan.step_id, plan.slots, plan.uses, tokens, np.ones(1, dtype=np.bool_), {}, known)
        steps.scheduler.collect(plan, result)
    (only,) = steps.said("a")
    assert [(p.token_id, p.logprob) for p in only.prompt_logprobs] == [(0, None), (1, -1), (2, -1), (3, -1), (4, -1)]


def test_new_weights_are_noted_with_the_first_token_computed_with_them():
    steps = Steps(weight_version="v1")
    steps.add("a", 4, 4)
    steps.step()
    steps.scheduler.weight_version = "v2"
    steps.scheduler.begin_weights("w2")
    steps.add("later", 4, 1, first_id=50)
    steps.finish_all()
    assert steps.said("a")[-1].meta.weights_versions == (("v1", 0), ("v2", 1))
    assert steps.said("later")[-1].meta.weights_versions == ()


def test_ends_of_new_weights_hold_for_requests_that_are_here_unless_they_ignore_eos():
    steps = Steps(eos=(7,))
    steps.add("a", 4, 9)
    steps.add("ignores", 4, 9, first_id=50, ignore_eos=True)
    steps.step()
    steps.scheduler.begin_weights("w2", end_ids=(8,))
    steps.step(token=8)
    assert steps.finish_of("a").matched == 8
    assert steps.finish_of("ignores") is None
    steps.scheduler.begin_weights("w3", end_ids=(6,))
    steps.add("later", 4, 9, first_id=90)
    (waiting,) = steps.scheduler.waiting
    assert waiting.stop_token_ids == {6, 7}


def test_counters_count_what_happened():
    steps = Steps()
    steps.add("a", 8, 3)
    steps.finish_all()
    steps.add("again", 8, 2)
    steps.finish_all()
    counters = steps.scheduler.counters
    assert (counters.prompt_tokens, counters.generated_tokens, counters.num_finished) == (16, 5, 2)
    assert (counters.cached_tokens_device, counters.cached_tokens_host, counters.cached_tokens_storage) == (4, 0, 0)


@pytest.mark.parametrize(("num_tokens", "is_sample"), [(_MIN_PREFILL_SAMPLE - 1, False), (_MIN_PREFILL_SAMPLE, True)])
def test_only_steps_with_enough_prompt_tokens_say_how_fast_prefill_is(num_tokens, is_sample, monkeypatch):
    """A step of decodes would make the copy of a page look dear."""
    seen = []
    steps = Steps(max_step_tokens=128, prefill_chunk_tokens=128)
    monkeypatch.setattr(steps.cache.lower.restore_cost, "saw_prefill", lambda num, seconds: seen.append((num, seconds)))
    steps.add("a", num_tokens, 1)
    plan = steps.plan()
    steps.clock.advance(0.5)
    steps.collect(plan)
    assert seen == ([(num_tokens, 0.5)] if is_sample else [])
