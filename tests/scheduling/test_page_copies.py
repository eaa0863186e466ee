"""A prompt that shares a part of a page: what the plan copies, what the request computes, and what its answer says."""

from msgspec import structs
from scheduler_steps import CLIENT, Steps, message

from headwater.cache.invariants import check_invariants
from headwater.messages.base import pack_ids
from headwater.messages.generation import LogprobParams

PROMPT = 8  # two pages of four tokens


def filled(**kwargs) -> Steps:
    """A scheduler whose cache has the pages of tokens 0 to 7, and which copies parts from two tokens on."""
    steps = Steps(min_part_tokens=2, **kwargs)
    steps.add("first", PROMPT, 1)
    steps.finish_all()
    return steps


def test_the_same_prompt_again_computes_one_token_behind_a_copy():
    steps = filled()
    steps.add("again", PROMPT, 2)
    plan = steps.plan()
    (copy,) = plan.page_copies
    assert (plan.num_computed.tolist(), plan.num_tokens.tolist(), copy.num_tokens) == ([7], [1], 3)
    table = plan.page_updates[0].pages.tolist()
    assert copy.target == table[1] and copy.source not in table
    steps.collect(plan)
    assert steps.said("again")[0].meta.cached_device == 7
    counters = steps.scheduler.counters
    assert (counters.cached_tokens_device, counters.copied_tokens) == (7, 3)
    steps.finish_all()
    assert steps.num_free_pages == 64
    check_invariants(steps.cache)


def test_a_plan_copies_only_for_requests_that_enter_with_it():
    steps = filled()
    steps.add("again", PROMPT, 4)
    assert len(steps.step().page_copies) == 1
    assert steps.step().page_copies == ()


def test_tokens_whose_logprobs_are_wanted_are_not_copied():
    steps = filled()
    steps.add("again", PROMPT, 1, logprobs=LogprobParams(prompt_start=7))
    plan = steps.plan()
    assert plan.num_computed.tolist() == [6] and plan.page_copies[0].num_tokens == 2


def test_a_copy_that_would_hold_the_last_page_is_given_up():
    """The page is pinned while it is copied: a pool that needs it for the request itself evicts it instead."""
    steps = filled(num_pages=4)
    prompt = pack_ids([*range(7), *range(50, 57)])  # needs all four pages; the first is cached, the part in the second
    steps.scheduler.add(structs.replace(message("longer", 14, 1), prompt_ids=prompt), client=CLIENT)
    plan = steps.plan()
    assert plan is not None and plan.page_copies == () and plan.num_computed.tolist() == [4]
    steps.collect(plan)
    steps.finish_all()
    check_invariants(steps.cache)


def test_the_source_stays_until_the_step_has_ended_though_the_request_has_not_waited():
    """On a GPU the request may be gone before its step is collected, and the copy may still run."""
    steps = filled()
    steps.add("again", PROMPT, 2)
    plan = steps.plan()
    steps.scheduler.abort("again", match="exact", message="")
    evictable = steps.cache.tier_pages[0].num_evictable
    check_invariants(steps.cache)
    assert evictable == 0 and steps.scheduler.running.has_leaving_pages
    steps.collect(plan)
    assert steps.cache.tier_pages[0].num_evictable == 2
    check_invariants(steps.cache)
