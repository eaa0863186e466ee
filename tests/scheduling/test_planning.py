"""What runs next: budgets, chunks, admission, and who gives way when pages run out."""

import pytest
from scheduler_steps import PAGE, Steps

from headwater.messages.generation import LogprobParams
from headwater.scheduling.limits import Admission
from headwater.scheduling.request import Phase


def test_a_prompt_is_cut_into_chunks_and_only_the_last_one_samples():
    steps = Steps(prefill_chunk_tokens=4, max_step_tokens=32)
    steps.add(num_prompt_tokens=10)
    plans = [steps.step() for _ in range(3)]
    assert [p.num_tokens.tolist() for p in plans] == [[4], [4], [2]]
    assert [p.samples.tolist() for p in plans] == [[False], [False], [True]]
    assert [p.num_decodes for p in plans] == [0, 0, 0]
    assert steps.step().num_decodes == 1


def test_a_chunk_that_ends_with_the_prompt_samples_at_once():
    steps = Steps(prefill_chunk_tokens=4)
    steps.add(num_prompt_tokens=8)
    assert [steps.step().samples.tolist() for _ in range(2)] == [[False], [True]]


def test_decodes_go_first_and_chunks_fill_what_is_left_of_the_budget():
    steps = Steps(max_step_tokens=8, prefill_chunk_tokens=6)
    steps.add("a", 4, 20)
    steps.add("b", 4, 20, first_id=100)
    steps.step()
    steps.add("c", 12, 20, first_id=200)
    plan = steps.plan()
    assert steps.rows(plan) == [("a", 1), ("b", 1), ("c", 6)]
    steps.collect(plan)
    steps.add("d", 12, 20, first_id=300)
    assert steps.rows(steps.plan()) == [("a", 1), ("b", 1), ("c", 6)]


def test_the_budget_is_never_exceeded():
    steps = Steps(max_step_tokens=5, prefill_chunk_tokens=5, max_running=8)
    for number in range(8):
        steps.add(f"r{number}", 4, 3, first_id=100 * number)
    for _ in range(60):
        plan = steps.plan()
        if plan is None:
            break
        assert 1 <= int(plan.num_tokens.sum()) <= 5
        steps.collect(plan)
    assert not steps.scheduler.in_flight()


def test_no_more_run_than_there_are_slots_and_the_next_one_starts_when_one_ends():
    steps = Steps(max_running=2)
    for number, rid in enumerate("abc"):
        steps.add(rid, 4, 2, first_id=100 * number)
    steps.step()
    assert steps.running == ["a", "b"]
    steps.step()
    assert steps.finish_of("a").type == "length"
    plan = steps.plan()
    assert steps.rows(plan) == [("c", 4)]


def test_a_new_request_needs_pages_for_its_prompt_and_the_next_token():
    """Of 4 pages a prompt of 12 tokens takes 4: 3 for itself and one for the token after it."""
    steps = Steps(num_pages=4)
    steps.add("a", 12, 2)
    plan = steps.plan()
    (running,) = steps.scheduler.running
    assert running.lease.num_pages == 4
    assert plan.num_tokens.tolist() == [12]


def test_a_prompt_without_a_new_token_takes_its_own_pages_only():
    steps = Steps(num_pages=4, max_context=16)
    steps.add("a", 12, 0)
    steps.step()
    assert steps.finish_of("a").type == "length"
    assert steps.tokens_of("a") == []


def test_each_running_request_keeps_a_page_to_grow_into():
    """Without that page, admission and retraction would alternate for ever."""
    steps = Steps(num_pages=6, max_running=4)
    steps.add("a", 6, 40)
    steps.step()  # 2 pages: 4 are left
    steps.add("b", 15, 4, first_id=100)  # would take 4, and a needs one
    plan = steps.plan()
    assert steps.rows(plan) == [("a", 1)]
    steps.collect(plan)
    steps.scheduler.abort("b", match="exact", message="")
    steps.add("c", 11, 4, first_id=200)  # takes 3
    assert steps.rows(steps.plan()) == [("a", 1), ("c", 11)]


def test_nobody_overtakes_a_long_prompt_that_waits_for_pages():
    """Short prompts that pass by for ever would starve it."""
    steps = Steps(num_pages=8, max_running=4)
    steps.add("a", 15, 40)
    steps.step()
    steps.add("long", 20, 4, first_id=100)
    steps.add("short", 2, 4, first_id=200)
    for _ in range(3):
        plan = steps.plan()
        assert steps.rows(plan) == [("a", 1)]
        steps.collect(plan)
    steps.scheduler.abort("a", match="exact", message="")
    assert [rid for rid, _ in steps.rows(steps.plan())] == ["long", "short"]


def test_the_latest_arrival_of_the_lowest_priority_gives_way():
    steps = Steps(num_pages=10, max_running=4)
    steps.add("low", 7, 40, first_id=0, priority=-1)
    steps.add("early", 7, 40, first_id=100)
    steps.add("late", 7, 40, first_id=200)
    steps.step()
    assert steps.running == ["early", "late", "low"]
    while "low" in steps.running:
        assert steps.running == ["early", "late", "low"]
        steps.step()
    assert [r.rid for r in steps.scheduler.waiting] == ["low"]
    while "late" in steps.running:
        steps.step()
    assert steps.running == ["early"]
    assert steps.scheduler.counters.num_retractions == 2


def test_a_retracted_request_goes_on_where_it_was():
    steps = Steps(num_pages=16)
    steps.add("a", 6, 5)
    for token in (901, 902):
        steps.step(token=token)
    assert steps.scheduler.retract_all() == 1
    assert steps.running == []
    plan = steps.plan()
    (assignment,) = plan.assignments
    assert assignment.token_ids.tolist() == [*range(6), 901, 902]
    assert plan.num_computed.tolist() == [PAGE]  # its one full page is in the tree
    assert plan.num_tokens.tolist() == [4]
    assert plan.num_outputs.tolist() == [2]  # the noise of the next token is that of the third
    steps.collect(plan, token=903)
    steps.finish_all()
    assert steps.tokens_of("a") == [901, 902, 903, 900, 900]


def test_no_step_is_planned_past_the_last_token():
    """With steps launched ahead, the last token is in flight while the next step is planned."""
    steps = Steps()
    steps.add("a", 4, 2)
    first = steps.plan()
    second = steps.plan()
    assert second.samples.tolist() == [True]
    assert steps.plan() is None
    steps.collect(first)
    steps.collect(second)
    assert steps.finish_of("a").type == "length"
    assert len(steps.tokens_of("a")) == 2


@pytest.mark.parametrize("admission", [Admission(may_run=False, may_start=False), Admission(may_run=False)])
def test_nothing_runs_while_admission_is_closed(admission):
    steps = Steps()
    steps.add("a")
    steps.step()
    steps.add("b", first_id=100)
    steps.scheduler.admission = admission
    assert steps.plan() is None
    assert steps.scheduler.in_flight() == {"running": 1}


def test_a_hold_lets_go_on_what_has_started_and_bars_the_rest():
    steps = Steps(max_running=2)
    steps.add("a")
    steps.add("new", first_id=100)
    steps.add("newer", first_id=200)
    steps.scheduler.admission = Admission(may_start=False)
    assert steps.plan() is None
    assert steps.scheduler.in_flight() == {}
    steps.scheduler.admission = Admission()
    assert steps.scheduler.in_flight() == {"queued": 3}
    steps.step()
    steps.scheduler.retract_all()
    steps.scheduler.admission = Admission(may_start=False)
    assert steps.scheduler.in_flight() == {"queued": 2}
    steps.step()
    assert steps.running == ["a", "new"]


def test_one_prompt_token_is_always_computed():
    """Without a row there is no logit to sample from."""
    steps = Steps()
    steps.add("a", 8, 1)
    steps.finish_all()
    steps.add("again", 8, 1)
    plan = steps.plan()
    assert plan.num_computed.tolist() == [PAGE]
    assert plan.num_tokens.tolist() == [4]


def test_prompt_logprobs_take_from_the_cache_only_what_lies_before_them():
    for start, num_cached in ((0, 0), (1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (-1, 8)):
        steps = Steps()
        steps.add("first", 12, 1)
        steps.finish_all()
        steps.add("again", 12, 1, logprobs=LogprobParams(prompt_start=start))
        assert steps.plan().num_computed.tolist() == [num_cached], f"prompt_start={start}"


def test_examining_a_long_queue_costs_a_bounded_look():
    """Held requests at the head of a queue longer than that are what a turn sees."""
    steps = Steps(max_queued=200)
    for number in range(150):
        steps.add(f"r{number}", 4, 1, first_id=number)
    steps.scheduler.admission = Admission(may_start=False)
    assert steps.plan() is None
    steps.scheduler.admission = Admission()
    assert steps.rows(steps.plan()) == [("r0", 4), ("r1", 4), ("r2", 4), ("r3", 4)]


def test_requests_end_in_the_phase_that_the_plan_puts_them_in():
    steps = Steps(prefill_chunk_tokens=4)
    steps.add("a", 8)
    phases = []
    for _ in range(3):
        steps.step()
        phases.append(next(iter(steps.scheduler.running)).phase)
    assert phases == [Phase.PREFILLING, Phase.DECODING, Phase.DECODING]
