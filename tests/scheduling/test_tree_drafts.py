"""Drafts from the prefix tree: what earlier answers of the same namespace said, and nothing that was flushed."""

import numpy as np
import pytest
from msgspec import structs
from scheduler_steps import PAGE, Steps, message

from headwater.cache.namespace import Scope
from headwater.messages.base import pack_ids
from headwater.messages.generation import Generate
from headwater.scheduling.plan import StepPlan, StepResult
from headwater.scheduling.speculation.drafters import SpeculationSettings

NUM_TOKENS = 24


def text_after(position: int, *, variant: int = 0) -> int:
    """The model of these tests: the token that follows a position, for all prompts."""
    return 500 + position + (100 * variant if position > 14 else 0)


def end(steps: Steps, plan: StepPlan, *, variant: int = 0) -> None:
    tokens = [text_after(int(p + n), variant=variant) for p, n in zip(plan.num_computed, plan.num_tokens, strict=True)]
    finite = np.ones(plan.num_rows, dtype=np.bool_)
    steps.scheduler.collect(
        plan,
        StepResult(
            step_id=plan.step_id, slots=plan.slots, uses=plan.uses, tokens=np.array(tokens, np.int32), is_finite=finite
        ),
    )


def answer(steps: Steps, rid: str, *, variant: int = 0, **fields) -> int:
    """Ask the question of every test, to its end; returns the steps that it took."""
    steps.add(rid, 6, NUM_TOKENS, **fields)
    num_steps = 0
    while (plan := steps.plan()) is not None:
        end(steps, plan, variant=variant)
        num_steps += 1
    assert steps.tokens_of(rid) == [text_after(6 + n, variant=variant) for n in range(NUM_TOKENS)]
    return num_steps


@pytest.fixture
def steps() -> Steps:
    return Steps(speculation=SpeculationSettings("tree"), num_pages=200)


def test_a_question_asked_again_takes_few_steps(steps):
    assert answer(steps, "a") == NUM_TOKENS
    assert answer(steps, "b") <= NUM_TOKENS // 3


def test_other_tenants_questions_show_nothing(steps):
    """Their steps, and so the time of the answer, are as if nobody had asked."""
    answer(steps, "a", cache_salt="one")
    assert answer(steps, "b", cache_salt="two") == answer(steps, "c", extra_key="k") == NUM_TOKENS
    assert answer(steps, "d", cache_salt="one") < NUM_TOKENS


def test_flushed_text_is_not_drafted(steps):
    answer(steps, "a")
    steps.cache.retire(Scope())
    assert answer(steps, "b") == NUM_TOKENS


def test_text_that_is_flushed_while_it_is_followed_ends_the_drafts(steps):
    answer(steps, "a")
    steps.add("b", 6, NUM_TOKENS)
    end(steps, steps.plan())
    plan = steps.plan()
    assert plan.has_drafts
    end(steps, plan)
    steps.cache.retire(Scope())
    while (plan := steps.plan()) is not None:
        assert not plan.has_drafts
        end(steps, plan)


def test_text_that_comes_back_after_a_flush_is_followed_from_the_beginning(steps):
    """The node where the request was is no part of the tree any more, and nothing is ever added below it."""
    answer(steps, "a")
    steps.add("b", 6, NUM_TOKENS)
    end(steps, steps.plan())
    plan = steps.plan()
    assert plan.has_drafts
    end(steps, plan)
    steps.cache.retire(Scope())
    whole = [*range(6), *(text_after(6 + n) for n in range(NUM_TOKENS))]
    steps.scheduler.add(_asking("c", whole, num_tokens=1), client=b"client")
    have_drafts = []
    while (plan := steps.plan()) is not None:
        have_drafts.append(plan.has_drafts)
        end(steps, plan)
    assert steps.tokens_of("b") == whole[6:]
    assert not have_drafts[0] and any(have_drafts)


def test_an_answer_that_goes_elsewhere_leaves_the_tree_and_the_text_used_last_is_followed(steps):
    """Nodes are split where texts part, also while a request follows them."""
    answer(steps, "a")
    assert answer(steps, "b", variant=1) > NUM_TOKENS // 3  # drafted what "a" said, up to where they part
    assert answer(steps, "c", variant=1) <= NUM_TOKENS // 3


def test_a_request_whose_prompt_ends_inside_a_page_is_found_by_its_first_tokens(steps):
    """Pages are keyed whole: the page that holds the newest token is compared as far as it is known."""
    answer(steps, "a")
    for num_more in range(1, PAGE + 1):
        prompt = [*range(6), *(text_after(6 + n) for n in range(num_more))]
        request = f"more{num_more}"
        steps.scheduler.add(_asking(request, prompt), client=b"client")
        end(steps, steps.plan())
        plan = steps.plan()
        assert plan.token_ids.tolist()[:3] == [text_after(len(prompt) + n) for n in range(3)]
        end(steps, plan)
        steps.scheduler.abort(request, match="exact", message="")


def test_the_own_text_is_drafted_where_the_tree_knows_nothing(steps):
    steps.scheduler.add(_asking("a", [1, 2, 3, 4, 5, 6, 500, 7, 8, 9, 10, 1, 2, 3, 4, 5, 6]), client=b"client")
    for _ in range(2):  # the prompt is longer than a chunk
        steps.step(token=500)
    plan = steps.plan()
    assert plan.token_ids.tolist()[:3] == [500, 7, 8]


def _asking(rid: str, prompt: list[int], *, num_tokens: int = NUM_TOKENS) -> Generate:
    return structs.replace(message(rid, 1, num_tokens), prompt_ids=pack_ids(prompt))
