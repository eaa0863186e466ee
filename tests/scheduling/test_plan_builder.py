"""Rows of a step: their order, and what they carry."""

import numpy as np
from scheduler_steps import Steps, request

from headwater.messages.generation import LogprobParams
from headwater.scheduling.plan import NEWEST_TOKEN, PageUpdate
from headwater.scheduling.plan_builder import PlanBuilder, PlanColumns


def in_slot(slot: int, **kwargs):
    one = request(f"r{slot}", **kwargs)
    one.slot = slot
    return one


def test_decodes_come_before_chunks_and_each_row_says_where_it_reads():
    decoding, prefilling = in_slot(1), in_slot(0, num_prompt_tokens=8)
    decoding.progress.num_computed, decoding.progress.num_launched_samples = 6, 1
    prefilling.progress.num_computed = 2
    updates = (PageUpdate(0, 0, np.array([3, 4], dtype=np.int32)),)
    builder = PlanBuilder(max_tokens=16)
    builder.add_chunk(prefilling, 5, samples=False)
    builder.add_decode(decoding)
    assert builder.num_tokens_left == 10
    plan = builder.build(7, uses=[10, 20], page_updates=updates)
    assert (plan.step_id, plan.num_decodes, plan.num_rows, plan.page_updates) == (7, 1, 2, updates)
    assert plan.slots.tolist() == [1, 0]
    assert plan.uses.tolist() == [20, 10]
    assert plan.num_computed.tolist() == [6, 2]
    assert plan.num_tokens.tolist() == [1, 5]
    assert plan.samples.tolist() == [True, False]
    assert plan.num_outputs.tolist() == [1, 0]
    assert plan.token_ids.tolist() == [NEWEST_TOKEN, 2, 3, 4, 5, 6]


def test_a_slot_is_assigned_with_all_tokens():
    one = in_slot(0, num_prompt_tokens=3, stop_token_ids=(5,))
    one.tokens.append(50)  # it was retracted after a token
    one.stop_token_ids = frozenset({5})
    builder = PlanBuilder(max_tokens=8)
    builder.assign(one, use=4)
    builder.add_chunk(one, 4, samples=True)
    plan = builder.build(0, uses=[4], page_updates=())
    (assignment,) = plan.assignments
    assert (assignment.slot, assignment.use, assignment.num_prompt_tokens) == (0, 4, 3)
    assert assignment.token_ids.tolist() == [0, 1, 2, 50]
    assert assignment.stop_token_ids == (5,)


def test_the_tokens_of_an_assignment_are_a_copy():
    """The runner keeps them while the request goes on growing."""
    one = in_slot(0, num_prompt_tokens=3)
    builder = PlanBuilder(max_tokens=8)
    builder.assign(one, use=1)
    builder.add_chunk(one, 3, samples=True)
    (assignment,) = builder.build(0, uses=[1], page_updates=()).assignments
    assert not np.shares_memory(assignment.token_ids, one.tokens.view())


def test_prompt_logprobs_are_not_asked_for_again_after_a_retraction():
    """They were reported with the first token; reported twice, positions no longer match."""
    asked = LogprobParams(top=2, token_ids=(7,), prompt_start=0)
    for num_outputs, prompt_start in ((0, 0), (1, -1)):
        one = in_slot(0, logprobs=asked)
        for _ in range(num_outputs):
            one.tokens.append(1)
        builder = PlanBuilder(max_tokens=8)
        builder.assign(one, use=1)
        builder.add_chunk(one, 2, samples=False)
        (assignment,) = builder.build(0, uses=[1], page_updates=()).assignments
        assert assignment.logprobs == LogprobParams(top=2, token_ids=(7,), prompt_start=prompt_start)


def test_an_empty_builder_makes_no_step():
    assert PlanBuilder(max_tokens=4).is_empty
    steps = Steps()
    assert steps.plan() is None


def test_plans_that_share_columns_keep_their_numbers():
    """A plan is still in flight while the next ones are built."""
    columns = PlanColumns()
    rows = [in_slot(slot) for slot in range(3)]

    def plan_of(*slots: int, uses: tuple[int, int, int] = (5, 6, 7)):
        builder = PlanBuilder(max_tokens=8, columns=columns)
        for slot in slots:
            builder.add_decode(rows[slot])
        return builder.build(0, uses=uses, page_updates=())

    first, same, fewer, reused = plan_of(0, 2), plan_of(0, 2), plan_of(2), plan_of(2, uses=(5, 6, 8))
    assert same.slots is first.slots
    assert [plan.slots.tolist() for plan in (first, same, fewer, reused)] == [[0, 2], [0, 2], [2], [2]]
    assert [plan.uses.tolist() for plan in (first, same, fewer, reused)] == [[5, 7], [5, 7], [7], [8]]
    assert [plan.token_ids.tolist() for plan in (first, fewer)] == [[NEWEST_TOKEN] * 2, [NEWEST_TOKEN]]
    assert [plan.num_tokens.tolist() for plan in (first, fewer)] == [[1, 1], [1]]
