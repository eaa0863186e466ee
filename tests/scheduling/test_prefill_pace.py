"""Prefill beside running streams: how much of it a step computes, from the measured time of steps."""

import pytest
from scheduler_steps import Steps

from headwater.scheduling.prefill_pace import PrefillPace


def test_a_step_takes_as_much_as_fits_into_the_gap():
    pace = PrefillPace(0.2)
    for _ in range(20):
        pace.saw(100, 0.1)
    assert pace.limit(1000) == 200
    assert pace.limit(50) == 50
    for _ in range(20):
        pace.saw(192, 0.8)  # 48 tokens in 0.2 s
    assert pace.limit(1000) == 48, "the machine has become busy"


def test_decodes_in_the_step_count_as_well():
    """Each step takes 0.1 s for its decodes and 1 ms a prompt token: the limit settles where both fit."""
    pace, num_tokens = PrefillPace(0.2), 0
    for _ in range(60):
        num_tokens = pace.limit(1000)
        pace.saw(num_tokens, 0.1 + num_tokens * 0.001)
    assert 0.17 <= 0.1 + num_tokens * 0.001 <= 0.2


def test_prompts_get_on_however_slow_the_machine_is():
    pace = PrefillPace(0.2)
    pace.saw(64, 100.0)
    assert pace.limit(1000) == 16
    assert pace.limit(7) == 7


def test_a_gpu_computes_what_costs_it_nothing_whatever_the_gap():
    """Its decodes alone may take longer than the gap, and prompts must not wait for that."""
    pace = PrefillPace(0.025, least_tokens=256)
    for _ in range(30):
        num_tokens = pace.limit(8000)
        pace.saw(num_tokens, 0.040 + num_tokens * 1e-4)
    assert num_tokens == 256
    assert pace.limit(100) == 100


def test_before_any_step_the_limit_is_cautious():
    assert PrefillPace(0.2).limit(1000) == 64
    assert PrefillPace(0.2, least_tokens=256).limit(1000) == 256


def test_steps_with_hardly_any_prompt_tokens_say_nothing():
    pace = PrefillPace(0.2)
    pace.saw(100, 0.1)
    pace.saw(1, 0.15)
    assert pace.limit(1000) == 200


@pytest.mark.parametrize("num_tokens", [1, 512, 10**6])
def test_without_a_gap_there_is_no_limit(num_tokens):
    pace = PrefillPace(None)
    pace.saw(100, 10.0)
    assert pace.limit(num_tokens) == num_tokens


def test_chunks_are_small_beside_a_stream_and_large_without():
    steps = Steps(max_gap_s=0.2, prefill_chunk_tokens=100, max_step_tokens=110, max_context=2000, num_pages=500)
    steps.add("stream", 4, 300)
    steps.step()
    steps.add("long", 600, 1, first_id=1000)
    sizes = []
    for _ in range(8):
        plan = steps.plan()
        sizes.append(int(plan.num_tokens.sum()) - plan.num_decodes)
        steps.clock.advance(0.005 * sizes[-1])
        steps.collect(plan)
    assert sizes == [64, *[40] * 7], "5 ms a token"
    steps.scheduler.abort("stream", match="exact", message="")
    assert steps.step().num_tokens.tolist() == [100]
