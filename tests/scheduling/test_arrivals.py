"""What is taken in and what is refused: at once, with the numbers, at exactly the border."""

import pytest
from scheduler_steps import CLIENT, PAGE, Steps, message


def refused(steps: Steps, rid: str = "a") -> tuple[int, str]:
    finish = steps.finish_of(rid)
    assert finish is not None, "not refused"
    return finish.status, finish.message


@pytest.mark.parametrize(("num_prompt_tokens", "num_tokens"), [(15, 1), (16, 0)])
def test_the_longest_prompt_of_a_context_runs(num_prompt_tokens, num_tokens):
    steps = Steps(max_context=16)
    steps.add("a", num_prompt_tokens, num_tokens)
    steps.finish_all()
    assert steps.finish_of("a").type == "length"
    assert len(steps.tokens_of("a")) == num_tokens


@pytest.mark.parametrize(("num_prompt_tokens", "num_tokens"), [(16, 1), (17, 0)])
def test_one_token_more_is_refused_with_the_numbers(num_prompt_tokens, num_tokens):
    steps = Steps(max_context=16)
    steps.add("a", num_prompt_tokens, num_tokens)
    status, text = refused(steps)
    assert status == 400
    assert "is longer than the model's context length" in text
    assert f"{num_prompt_tokens} tokens" in text
    assert "16 tokens" in text


@pytest.mark.parametrize("num_pages", [2, 3])
def test_a_small_cache_bounds_prompts_as_the_context_does(num_pages):
    """The last slot of the last page is needed to write the last token."""
    capacity = num_pages * PAGE - 1
    for num_prompt_tokens, num_tokens, fits in (
        (capacity, 0, True),
        (capacity - 1, 1, True),
        (capacity, 1, False),
        (capacity + 1, 0, False),
    ):
        steps = Steps(num_pages=num_pages)
        steps.add("a", num_prompt_tokens, num_tokens)
        if fits:
            steps.finish_all()
            assert steps.finish_of("a").type == "length"
        else:
            assert refused(steps)[0] == 400


def test_more_tokens_than_there_is_room_for_are_cut():
    steps = Steps(max_context=16)
    steps.add("a", 10, 100)
    steps.finish_all()
    assert len(steps.tokens_of("a")) == 6
    assert steps.finish_of("a").type == "length"


def test_an_empty_prompt_is_refused():
    steps = Steps()
    steps.add("a", 0)
    assert refused(steps) == (400, "the prompt is empty; at least one token is needed")


def test_ids_beyond_the_vocabulary_are_refused_with_the_range():
    steps = Steps(vocab_size=10)
    steps.add("fits", 2, first_id=8)
    steps.add("high", 3, first_id=8)
    steps.add("low", 2, first_id=-1)
    assert steps.finish_of("fits") is None
    for rid in ("high", "low"):
        status, text = refused(steps, rid)
        assert status == 400
        assert "from 0 to 9" in text


def test_the_queue_is_full_at_its_limit_and_not_before():
    steps = Steps(max_queued=2)
    for rid in "abc":
        steps.add(rid)
    assert steps.finish_of("a") is None
    assert steps.finish_of("b") is None
    assert refused(steps, "c")[0] == 429
    steps.scheduler.abort("a", match="exact", message="")
    steps.add("d")
    assert steps.finish_of("d") is None


def test_a_rid_in_use_is_refused_for_its_client_only_and_free_again_at_the_end():
    steps = Steps()
    steps.add("a")
    steps.scheduler.add(message("a"), client=b"other")
    assert len(steps.scheduler.waiting) == 2
    steps.scheduler.take_outputs()
    steps.scheduler.add(message("a"), client=CLIENT)
    ((client, outputs),) = steps.scheduler.take_outputs()
    assert (client, outputs.items[0].finish.status) == (CLIENT, 400)
    steps.finish_all()
    steps.add("a")
    assert len(steps.scheduler.waiting) == 1


def test_refusals_are_counted_and_hold_nothing():
    steps = Steps(max_queued=0)
    steps.add("a")
    assert refused(steps)[0] == 429
    assert steps.scheduler.counters.num_refused == 1
    assert steps.scheduler.counters.prompt_tokens == 0
    assert steps.scheduler.in_flight() == {}


def test_stop_tokens_are_the_models_and_the_requests_unless_eos_is_ignored():
    for ignore_eos, ends in ((False, {2, 7}), (True, {7})):
        steps = Steps(eos=(2,))
        steps.add("a", stop_token_ids=(7,), ignore_eos=ignore_eos)
        (one,) = steps.scheduler.waiting
        assert one.stop_token_ids == ends


@pytest.mark.parametrize(
    ("match", "rid", "gone"),
    [("exact", "job", {"job"}), ("prefix", "job", {"job", "job-1"}), ("all", "", {"job", "job-1", "other"})],
)
def test_an_abort_ends_whom_it_names_in_every_phase(match, rid, gone):
    steps = Steps(max_running=1)
    for name in ("job", "job-1", "other"):
        steps.add(name)
    steps.step()  # job runs, the others wait
    assert steps.scheduler.abort(rid, match=match, message="enough") == len(gone)
    for name in ("job", "job-1", "other"):
        finish = steps.finish_of(name)
        assert (finish is not None) == (name in gone)
        if finish is not None:
            assert (finish.type, finish.message) == ("abort", "enough")
    assert steps.scheduler.counters.num_aborted == len(gone)
    steps.finish_all()
    assert steps.num_free_pages == 64
