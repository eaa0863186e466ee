"""Drafts in plans, and what a step's result makes of them: positions, noise, pages, ends, failures."""

from collections.abc import Sequence

import numpy as np
import pytest
from scheduler_steps import PAGE, Steps

from headwater.messages.generation import TokenLogprob
from headwater.scheduling.plan import NEWEST_TOKEN, StepPlan, StepResult
from headwater.scheduling.speculation.drafters import GPU_LIMITS, SpeculationSettings
from headwater.scheduling.speculation.drafting import Source


class ScriptedDrafter:
    """Drafts what the test says, by rid."""

    def __init__(self, **drafts: Sequence[int]) -> None:
        self.drafts = drafts

    def draft(self, request, drafting, most):
        tokens = list(self.drafts.get(request.rid, ()))[:most]
        return np.array(tokens, dtype=np.int32), Source.LONG_SUFFIX if tokens else Source.NONE


def drafting(num_tokens: int = 20, *, num_draft_tokens: int = 12, sizes: dict | None = None, **drafts) -> Steps:
    """Request "a", whose prompt of 6 tokens and first token (900) are computed."""
    settings = SpeculationSettings(drafter=ScriptedDrafter(**drafts), num_draft_tokens=num_draft_tokens)
    steps = Steps(speculation=settings, **(sizes or {}))
    steps.add("a", 6, num_tokens)
    steps.step()
    return steps


def end(steps: Steps, plan: StepPlan, tokens: Sequence[int], *, not_finite: tuple[int, ...] = ()) -> None:
    """The step ends, and its rows have sampled these tokens."""
    is_finite = np.ones(plan.num_rows, dtype=np.bool_)
    is_finite[list(not_finite)] = False
    steps.scheduler.collect(
        plan,
        StepResult(
            step_id=plan.step_id,
            slots=plan.slots,
            uses=plan.uses,
            tokens=np.array(tokens, dtype=np.int32),
            is_finite=is_finite,
            logprobs={row: TokenLogprob(token_id=token, logprob=-float(row)) for row, token in enumerate(tokens)},
        ),
    )


def test_a_draft_is_rows_behind_the_row_of_its_request():
    plan = drafting(a=[11, 12, 13]).plan()
    assert plan.slots.tolist() == [plan.slots[0]] * 4 and plan.has_drafts
    assert plan.token_ids.tolist() == [900, 11, 12, 13]
    assert plan.num_computed.tolist() == [6, 7, 8, 9] and plan.num_tokens.tolist() == [1, 1, 1, 1]
    assert plan.num_outputs.tolist() == [1, 2, 3, 4]  # each row has the noise of its own position
    assert plan.num_decodes == 4 and plan.samples.all()


@pytest.mark.parametrize(
    ("sampled", "taken"),
    [
        ([11, 12, 13, 14], [11, 12, 13, 14]),
        ([11, 12, 99, 14], [11, 12, 99]),
        ([11, 50, 13, 14], [11, 50]),
        ([50, 12, 13, 14], [50]),
        ([50, 11, 12, 13], [50]),  # right ones, one place too late
    ],
)
def test_tokens_count_up_to_the_first_that_the_draft_missed(sampled, taken):
    steps = drafting(a=[11, 12, 13])
    end(steps, steps.plan(), sampled)
    assert steps.tokens_of() == [900, *taken]
    plan = steps.plan()
    assert (plan.num_computed[0], plan.num_outputs[0]) == (6 + len(taken), 1 + len(taken))
    assert plan.token_ids[0] == taken[-1]  # the runner's newest token may be one that does not count


def test_tokens_of_one_step_are_one_output_with_their_own_logprobs():
    steps = drafting(a=[11, 12])
    steps.said()
    end(steps, steps.plan(), [11, 12, 13])
    output = steps.said()[-1]
    assert output.token_ids == (11, 12, 13)
    assert [(it.token_id, it.logprob) for it in output.logprobs] == [(11, 0.0), (12, -1.0), (13, -2.0)]


def test_an_answer_never_gets_more_tokens_than_it_asked_for():
    steps = drafting(4, a=[11, 12, 13, 14, 15])
    plan = steps.plan()
    assert plan.token_ids.tolist() == [900, 11, 12]
    end(steps, plan, [11, 12, 13])
    assert steps.tokens_of() == [900, 11, 12, 13] and steps.finish_of().type == "length"
    assert steps.plan() is None


def test_a_stop_token_inside_a_draft_ends_the_answer_there():
    settings = SpeculationSettings(drafter=ScriptedDrafter(a=[11, 12, 13]))
    steps = Steps(speculation=settings)
    steps.add("a", 6, 20, stop_token_ids=(12,), min_new_tokens=0)
    steps.step()
    end(steps, steps.plan(), [11, 12, 13, 14])
    assert steps.tokens_of() == [900, 11, 12]
    assert (steps.finish_of().type, steps.finish_of().matched) == ("stop", 12)
    assert not steps.cache.leases


def test_a_stop_token_before_min_new_tokens_does_not_end_a_draft():
    settings = SpeculationSettings(drafter=ScriptedDrafter(a=[11, 12, 13]))
    steps = Steps(speculation=settings)
    steps.add("a", 6, 20, stop_token_ids=(12,), min_new_tokens=3)
    steps.step()
    end(steps, steps.plan(), [11, 12, 13, 14])
    assert steps.tokens_of() == [900, 11, 12, 13, 14] and steps.finish_of() is None


def test_rows_that_do_not_count_may_hold_anything():
    """Logits that are not finite behind a wrong token say nothing about the request."""
    steps = drafting(a=[11, 12])
    end(steps, steps.plan(), [50, 7, 8], not_finite=(1, 2))
    assert steps.tokens_of() == [900, 50] and steps.finish_of() is None
    end(steps, steps.plan(), [11, 7, 8], not_finite=(1,))
    assert steps.finish_of().status == 500


def test_kv_of_tokens_that_did_not_count_is_never_published():
    steps = drafting(a=[11, 12, 13, 14, 15])
    end(steps, steps.plan(), [11, 12, 77, 0, 0, 0])  # positions 6, 7, 8 count; 9 to 11 hold wrong KV
    steps.scheduler.abort("a", match="exact", message="")
    (root,) = steps.cache.tree.roots.values()
    published = np.concatenate([node.tokens for node in steps.cache.tree.subtree(root)]).tolist()
    assert published == [0, 1, 2, 3, 4, 5, 900, 11]  # two pages; the third holds the first wrong position


def test_a_step_that_raises_ends_its_request_once():
    steps = drafting(a=[11, 12])
    assert steps.scheduler.fail(steps.plan(), RuntimeError("x")) == 1
    assert steps.finish_of().status == 500 and not steps.cache.leases


def test_drafts_take_free_pages_only():
    """A page for a draft is never evicted, nor one that another request needs for its next token."""
    steps = drafting(40, a=list(range(11, 23)), sizes={"num_pages": 4})
    assert steps.plan().num_rows == 6  # 6 to 11: its own two pages, and one that is free; the fourth stays


def test_a_request_retracts_nobody_for_its_draft():
    """It leaves each request a free page: "b" grows while "a" drafts, and "a" ends before it needs what it drafted."""
    settings = SpeculationSettings(drafter=ScriptedDrafter(a=list(range(11, 23))))
    steps = Steps(speculation=settings, num_pages=6)
    steps.add("a", 6, 30, stop_token_ids=(503,))
    steps.add("b", 6, 8, first_id=50)
    steps.step()
    for token in range(500, 507):
        plan = steps.plan()
        end(steps, plan, [token] * plan.num_rows)
    assert steps.scheduler.counters.num_retractions == 0 and steps.scheduler.counters.spec_draft_tokens > 0
    assert steps.finish_of("a").type == "stop" and steps.finish_of("b").type == "length"


def test_two_requests_have_their_own_drafts_beside_a_prompt():
    settings = SpeculationSettings(drafter=ScriptedDrafter(a=[11], b=[21, 22]))
    steps = Steps(speculation=settings)
    for rid, first_id in (("a", 0), ("b", 50)):
        steps.add(rid, 6, 20, first_id=first_id)
    steps.step()
    steps.add("c", 5, 3, first_id=90)
    plan = steps.plan()
    assert steps.rows(plan) == [("a", 1)] * 2 + [("b", 1)] * 3 + [("c", 5)]
    assert plan.num_decodes == 5 and plan.num_computed.tolist() == [6, 7, 6, 7, 8, 0]
    end(steps, plan, [11, 12, 21, 40, 41, 60])
    assert [steps.tokens_of(rid) for rid in "abc"] == [[900, 11, 12], [900, 21, 40], [60]]


def test_drafts_leave_the_step_its_tokens():
    steps = drafting(a=list(range(11, 23)), sizes={"max_step_tokens": 6})
    assert steps.plan().num_rows == 6  # one less than without the limit


def test_requests_share_what_is_left_of_a_step():
    settings = SpeculationSettings(drafter=ScriptedDrafter(a=list(range(11, 23)), b=list(range(31, 43)), c=[61]))
    steps = Steps(speculation=settings, max_step_tokens=12)
    for number, rid in enumerate("abc"):
        steps.add(rid, 4, 30, first_id=100 * number)
    steps.step()
    plan = steps.plan()
    assert [rid for rid, _ in steps.rows(plan)] == ["a"] * 4 + ["b"] * 4 + ["c"] * 2


def test_a_full_batch_has_no_drafts():
    names = [f"r{n}" for n in range(17)]
    settings = SpeculationSettings(drafter=ScriptedDrafter(**{name: [11, 12] for name in names}))
    steps = Steps(speculation=settings, num_pages=400, max_running=17, max_step_tokens=400, max_queued=20)
    for number, name in enumerate(names):
        steps.add(name, 6, 20, first_id=100 * number)
    steps.step()
    assert not steps.plan().has_drafts


@pytest.mark.parametrize(
    "fields", [{"frequency_penalty": 0.1}, {"presence_penalty": 0.1}, {"repetition_penalty": 1.1}], ids=str
)
def test_requests_whose_choice_depends_on_earlier_tokens_have_no_drafts(fields):
    steps = Steps(speculation=SpeculationSettings(drafter=ScriptedDrafter(a=[11])))
    steps.add("a", 6, 20, **fields)
    steps.step()
    plan = steps.plan()
    assert plan.num_rows == 1 and plan.token_ids.tolist() == [NEWEST_TOKEN]


def test_the_next_step_waits_for_the_tokens_of_a_draft():
    """A runner that is ahead of the results would compute from a token that may not count."""
    steps = drafting(a=[11, 12])
    plan = steps.plan()
    assert steps.plan() is None
    end(steps, plan, [11, 50, 0])
    assert steps.plan().num_computed[0] == 8


def test_counts_say_what_was_drafted_and_what_was_right():
    steps = drafting(6, a=[11, 12, 13])
    end(steps, steps.plan(), [11, 12, 50, 0])
    end(steps, steps.plan(), [11, 77])
    meta = steps.said()[-1].meta
    assert (meta.num_draft_steps, meta.num_drafted, meta.num_accepted) == (2, 4, 3)
    counters = steps.scheduler.counters
    assert (counters.spec_verify_steps, counters.spec_draft_tokens, counters.spec_accepted_tokens) == (2, 4, 3)


def test_pages_of_a_draft_reach_the_runner():
    steps = drafting(40, a=list(range(11, 23)))
    plan = steps.plan()
    mapped = {update.first + n: page for update in plan.page_updates for n, page in enumerate(update.pages.tolist())}
    assert max(mapped) == int(plan.num_computed[-1]) // PAGE


def ahead(steps: Steps, num_steps: int, *, drafted_s: float = 0.006) -> list[StepPlan]:
    """Steps as a GPU computes them, one ahead of what is known: 4 ms, with drafts `drafted_s`. All rows sample 11."""
    plans: list[StepPlan] = []
    pending: StepPlan | None = None
    while len(plans) < num_steps:
        plan = steps.plan()
        assert plan is not None or pending is not None, "nothing runs, and nothing is planned"
        assert plan is None or pending is None or not (plan.has_drafts or pending.has_drafts), "upon unknown tokens"
        if plan is not None:
            plans.append(plan)
        if pending is not None:
            steps.clock.advance(drafted_s if pending.has_drafts else 0.004)
            end(steps, pending, [11] * pending.num_rows)
        pending = plan
    return plans


@pytest.mark.parametrize(("drafted_s", "num_drafting", "pays"), [(0.006, 1, False), (0.006, 8, True), (0.004, 1, True)])
def test_a_batch_waits_for_tokens_only_if_its_drafts_bring_more_than_the_wait_costs(drafted_s, num_drafting, pays):
    """Of eight requests, one has two right tokens a step: not worth half a step of all, but worth nothing at all."""
    names = [f"r{n}" for n in range(8)]
    settings = SpeculationSettings(
        drafter=ScriptedDrafter(**{name: [11, 11] for name in names[:num_drafting]}), limits=GPU_LIMITS
    )
    sizes = {"num_pages": 4000, "max_running": 8, "max_step_tokens": 400, "max_context": 2000, "max_queued": 20}
    steps = Steps(speculation=settings, **sizes)
    for number, name in enumerate(names):
        steps.add(name, 6, 1000, first_id=100 * number)
    plans = ahead(steps, 150, drafted_s=drafted_s)
    drafted = [plan.has_drafts for plan in plans[100:]]
    assert all(drafted) if pays else not any(drafted)
    assert any(plan.has_drafts for plan in plans[:100])


def test_text_that_repeats_nothing_is_launched_ahead():
    steps = Steps(speculation=SpeculationSettings(drafter=ScriptedDrafter(), limits=GPU_LIMITS))
    steps.add("a", 6, 20)
    first = steps.plan()
    second = steps.plan()
    assert second is not None and second.token_ids.tolist() == [NEWEST_TOKEN]
    end(steps, first, [11])


def test_a_batch_that_is_too_large_is_launched_ahead():
    names = [f"r{n}" for n in range(33)]
    drafter = ScriptedDrafter(**{name: [11, 12] for name in names})
    sizes = {"num_pages": 400, "max_running": 33, "max_step_tokens": 400, "max_queued": 40}
    steps = Steps(speculation=SpeculationSettings(drafter=drafter, limits=GPU_LIMITS), **sizes)
    for number, name in enumerate(names):
        steps.add(name, 6, 20, first_id=100 * number)
    steps.plan()
    second = steps.plan()
    assert second is not None and not second.has_drafts
