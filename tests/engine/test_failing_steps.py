"""A step or a message that raises: its own requests end with an error, all others go on, the books stay right."""

import pytest

from engine_driver import Driver, expected
from headwater.messages.base import pack_ids
from headwater.messages.control import Failed
from headwater.messages.generation import Generate, SamplingParams
from headwater.messages.state import Ping
from headwater.messages.weights import GetWeights
from headwater.simulation.checks.violation import Violation
from headwater.simulation.fakes.runner import StepFault

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
WHERE = pytest.mark.parametrize("where", ["launch", "collect"])


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(seed * 131 + i * i * 7 + i) % 997 for i in range(length)]


@BOTH
@WHERE
def test_the_requests_of_the_step_end_with_an_error_and_no_others(is_async, where):
    driver = Driver(is_async=is_async, max_running=2)
    failing = [driver.generate(name, prompt_of(20, seed), 40) for seed, name in enumerate("ab")]
    waiting = driver.generate("c", prompt_of(20, 2), 8)  # for a slot
    driver.turn(6)
    driver.runner.next_fault = where
    driver.turn(2)
    for seed, answer in enumerate(failing):
        assert (answer.finish.type, answer.finish.status, answer.finish.err_type) == ("abort", 500, "engine_error")
        assert "StepFault" in answer.finish.message
        assert answer.tokens == expected(prompt_of(20, seed), 40)[: len(answer.tokens)]
    assert waiting.finish is None
    driver.finish()
    assert waiting.tokens == expected(prompt_of(20, 2), 8)
    counters = driver.parts.scheduler.counters
    assert (counters.num_failed_steps, counters.num_failed) == (1, 2)
    driver.turn(2)
    assert driver.parts.blockers() == {}
    driver.check_all_pages_back()


@BOTH
@WHERE
def test_what_a_failed_step_wrote_is_never_matched(is_async, where):
    driver = Driver(is_async=is_async, prefill_chunk_tokens=16)
    prompt = prompt_of(60)
    first = driver.generate("a", prompt, 4)
    driver.turn(2)  # whole chunks are in, and may be shared
    driver.runner.next_fault = where
    driver.finish(first)
    assert first.finish.status == 500
    again = driver.generate("b", prompt, 4)
    driver.finish(again)
    assert again.tokens == expected(prompt, 4)
    assert 0 < again.meta.cached_device < 60


@BOTH
def test_ten_steps_in_a_row_are_not_the_requests_fault(is_async):
    driver = Driver(is_async=is_async)
    driver.runner.fault_rate = 1.0
    for number in range(9):
        driver.generate(f"r{number}", prompt_of(8, number), 2)
        driver.turn(3)
    assert len(driver.answers) == 9 and all(answer.finish.status == 500 for answer in driver.answers.values())
    driver.generate("last", prompt_of(8), 2)
    with pytest.raises(Violation, match="10 steps in a row have failed"):
        driver.turn(3)


def test_one_step_that_works_begins_the_count_anew():
    driver = Driver()
    for number in range(25):
        driver.runner.next_fault = "launch" if number % 5 else None
        driver.generate(f"r{number}", prompt_of(8, number), 1)
        driver.turn(2)
    assert driver.parts.scheduler.counters.num_failed_steps == 20


def test_a_lost_device_ends_the_engine(monkeypatch):
    """After a sticky error of CUDA nothing can work: the supervisor has to start it again."""
    driver = Driver()

    def recover() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(driver.runner, "recover", recover)
    driver.runner.next_fault = "collect"
    driver.generate("a", prompt_of(8), 2)
    with pytest.raises(Violation, match="illegal memory access"):
        driver.turn(2)


def test_a_call_that_makes_its_handling_raise_is_answered(monkeypatch):
    driver = Driver()
    running = driver.generate("a", prompt_of(20), 30)
    driver.turn(2)

    def values(name: str, num_values: int) -> None:
        raise StepFault("no such thing")

    monkeypatch.setattr(driver.runner.weights, "values", values)
    driver.send(GetWeights(call_id="w", name="weight"))
    driver.send(Ping(call_id="p"))
    driver.turn()
    failed = driver.replies["w"]
    assert isinstance(failed, Failed) and failed.status == 500 and "no such thing" in failed.message
    assert "p" in driver.replies
    driver.finish(running)
    assert running.tokens == expected(prompt_of(20), 30)


def refused_in(driver: Driver, *messages: Generate) -> dict[str, int]:
    """Rid and status of what ended in one turn, without the oracle: no client of ours would send that."""
    loop = driver.parts.loop
    driver.wire.inbound += [(b"odd", message) for message in messages]
    driver.wire.on_receive = lambda wait_s, received: None
    loop.turn()
    outputs = [outputs for _, outputs in driver.wire.sent]
    driver.wire.sent.clear()
    return {item.rid: item.finish.status for each in outputs for item in each.items if item.finish}


@pytest.mark.parametrize(
    ("prompt", "status"), [(b"123", 500), (b"", 400), (pack_ids([1, -1]), 400), (pack_ids([1, 1000]), 400)]
)
def test_a_prompt_that_no_client_of_ours_sends_ends_its_request_alone(prompt, status):
    """Half a token, no token, tokens out of the vocabulary."""
    driver = Driver()
    odd = Generate(rid="odd", prompt_ids=prompt, sampling=SamplingParams(max_new_tokens=2))
    assert refused_in(driver, odd) == {"odd": status}
    assert not driver.parts.scheduler.waiting and driver.parts.blockers() == {}


@BOTH
@pytest.mark.parametrize("max_context", [32, 33, 34, 35])
def test_a_prompt_of_the_whole_context_without_a_new_token(is_async, max_context):
    """The page table holds the context and not a token more, whether or not it is whole pages."""
    driver = Driver(is_async=is_async, max_context=max_context, num_pages=40)
    answers = [driver.generate(f"r{n}", prompt_of(max_context, n), 0) for n in range(2)]
    again = driver.generate("again", prompt_of(max_context, 0), 0)
    driver.finish()
    for answer in (*answers, again):
        assert answer.finish.type == "length" and answer.tokens == []
    driver.settle()
    driver.check_all_pages_back()


@BOTH
def test_one_token_more_than_the_context_is_refused_in_sglangs_words(is_async):
    driver = Driver(is_async=is_async, max_context=32)
    for prompt, num_tokens in ((33, 0), (32, 1)):
        answer = driver.generate(f"{prompt}", prompt_of(prompt), num_tokens)
        driver.finish(answer)
        assert answer.finish.status == 400
        assert "is longer than the model's context length (32 tokens)" in answer.finish.message
