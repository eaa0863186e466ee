"""Weight updates and memory release: never a stale hit, all or nothing, nothing lost."""

import pytest

from engine_driver import Driver, expected
from headwater.messages.control import CancelOperation, ContinueGeneration, Failed, FlushCache, PauseGeneration
from headwater.messages.weights import (
    GetWeights,
    MemoryResult,
    ReleaseMemory,
    ResumeMemory,
    SetWeightVersion,
    UpdateWeights,
    Weights,
    WeightsUpdated,
    WeightVersionSet,
)
from headwater.simulation.fakes.memory import FakeStagedWeights

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(seed * 131 + i * i * 7 + i) % 997 for i in range(length)]


def wait_for(driver: Driver, *call_ids: str) -> None:
    for _ in range(200):
        if all(call_id in driver.replies for call_id in call_ids):
            return
        driver.turn()
    raise AssertionError(f"no answer to {call_ids}")


@BOTH
def test_no_request_hits_kv_of_other_weights(is_async):
    """Fails if `weights_id` is left out of the namespace: nothing flushes here but the update itself."""
    driver = Driver(is_async=is_async)
    prompt = prompt_of(40)
    driver.generate("old", prompt, 3)
    driver.finish()
    driver.send(UpdateWeights(call_id="u", path="w1", weight_version="v1"))
    wait_for(driver, "u")
    result = driver.replies["u"]
    assert isinstance(result, WeightsUpdated)
    assert (result.weights_id, result.weight_version) == ("w1", "v1")
    assert result.freed["device"].pages == 10
    new = driver.generate("new", prompt, 3)
    driver.finish()
    assert new.meta.cached_device == 0 and new.meta.weight_version == "v1"
    assert new.tokens == expected(prompt, 3, "w1")
    driver.send(UpdateWeights(call_id="back", path="w0"))
    wait_for(driver, "back")
    again = driver.generate("again", prompt, 3)
    driver.finish()
    assert again.meta.cached_device == 0 and again.tokens == expected(prompt, 3, "w0")


@BOTH
def test_requests_running_across_an_update_go_on_are_marked_and_publish_nothing(is_async):
    driver = Driver(is_async=is_async)
    prompt = prompt_of(24)
    running = driver.generate("a", prompt, 40)
    driver.turn(6)
    driver.send(UpdateWeights(call_id="u", path="w1", weight_version="v1"))
    wait_for(driver, "u")
    driver.finish()
    (old, first), (new, switch) = running.meta.weights_versions
    assert (old, first, new) == ("default", 0, "v1") and 0 < switch < 40
    # KV of the prompt and of the outputs before the switch, but the newest, was written by the old weights.
    by = ["w0"] * (len(prompt) + switch - 1) + ["w1"]
    assert running.tokens == expected(prompt, 40, by)
    driver.settle()
    later = driver.generate("b", prompt + running.tokens, 2)
    driver.finish()
    assert later.meta.cached_device == 0
    driver.settle()
    driver.check_all_pages_back()


@BOTH
def test_a_broken_checkpoint_changes_nothing(is_async):
    driver = Driver(is_async=is_async)
    prompt = prompt_of(40)
    driver.generate("old", prompt, 3)
    driver.finish()
    driver.send(UpdateWeights(call_id="u", path="corrupt/half-written", weight_version="v1"))
    wait_for(driver, "u")
    failed = driver.replies["u"]
    assert isinstance(failed, Failed) and failed.status == 400 and "half-written" in failed.message
    still = driver.generate("still", prompt, 3)
    driver.finish()
    assert still.meta.cached_device == 36 and still.meta.weight_version == "default"
    assert still.tokens == expected(prompt, 3)


def test_serving_goes_on_while_weights_are_staged():
    driver = Driver()
    driver.runner.weights.num_polls = 60
    answer = driver.generate("a", prompt_of(20), 500)
    driver.turn(2)
    driver.send(UpdateWeights(call_id="u", path="w1"))
    driver.turn(5)
    assert "u" not in driver.replies and len(answer.tokens) >= 5


def test_updates_are_carried_out_one_after_the_other():
    driver = Driver()
    for n in (1, 2, 3):
        driver.send(UpdateWeights(call_id=f"u{n}", path=f"w{n}"))
    wait_for(driver, "u1", "u2", "u3")
    assert driver.runner.weights.current == "w3"
    assert [driver.replies[f"u{n}"].weights_id for n in (1, 2, 3)] == ["w1", "w2", "w3"]


def test_an_update_that_waits_too_long_behind_another_is_refused():
    driver = Driver()
    driver.runner.weights.num_polls = 1000
    driver.send(UpdateWeights(call_id="slow", path="w1", timeout_s=1000.0))
    driver.send(UpdateWeights(call_id="late", path="w2", timeout_s=0.5))
    wait_for(driver, "late")
    assert isinstance(driver.replies["late"], Failed) and "slow" not in driver.replies


def test_abort_all_requests_ends_them_with_the_update():
    driver = Driver()
    answer = driver.generate("a", prompt_of(20), 500)
    driver.turn(2)
    driver.send(UpdateWeights(call_id="u", path="w1", abort_all_requests=True, weight_version="new"))
    wait_for(driver, "u")
    assert answer.finish.type == "abort" and driver.replies["u"].num_aborted == 1
    assert (answer.meta.weight_version, answer.meta.weights_versions) == ("default", ()), "it is not of the new weights"


@pytest.mark.parametrize("is_resumed", [False, True], ids=["updated", "resumed to changed files"])
def test_tokens_that_end_answers_of_new_weights_do_so_until_others_come(is_resumed, monkeypatch):
    """A chat model's own end token, in place of a base model: answers would run on to their limit."""
    driver = Driver()
    text = expected(prompt_of(20), 12, "w1")
    assert text[4] not in text[:4]
    monkeypatch.setattr(FakeStagedWeights, "end_ids", (text[4],))
    monkeypatch.setattr(driver.oracle, "_eos_token_ids", frozenset({text[4]}))
    if is_resumed:
        released(driver)
        driver.runner.weights.on_disk = "w1"
        driver.send(ResumeMemory(call_id="u", accept_changed_weights=True))
    else:
        driver.send(UpdateWeights(call_id="u", path="w1"))
    wait_for(driver, "u")
    answer = driver.generate("a", prompt_of(20), 12)
    driver.finish(answer)
    assert answer.finish.type == "stop" and answer.tokens == text[:5]
    monkeypatch.undo()
    driver.send(UpdateWeights(call_id="same", path="w1"))
    wait_for(driver, "same")
    longer = driver.generate("b", prompt_of(20), 12)
    driver.finish(longer)
    assert longer.tokens == text


def test_new_weights_in_place_of_released_ones_need_no_resume():
    driver = Driver()
    driver.send(ReleaseMemory(call_id="r", tags=("weights",)))
    wait_for(driver, "r")
    driver.send(UpdateWeights(call_id="u", path="w1"))
    wait_for(driver, "u")
    assert driver.parts.control.released_memory == ()
    answer = driver.generate("a", prompt_of(8), 2)
    driver.finish(answer)
    assert answer.finish.type == "length"


def test_a_flush_waits_for_an_update_that_is_being_carried_out():
    driver = Driver()
    driver.send(UpdateWeights(call_id="u", path="w1"))
    driver.send(FlushCache(call_id="f"))
    driver.turn()
    assert driver.replies["f"].blockers == {"weight_update": 1}


def test_the_label_never_takes_part_in_matching():
    driver = Driver()
    driver.generate("a", prompt_of(40), 2)
    driver.finish()
    driver.send(SetWeightVersion(call_id="v", weight_version="v9"))
    answer = driver.generate("b", prompt_of(40), 2)
    driver.finish()
    assert driver.replies["v"] == WeightVersionSet(call_id="v", weight_version="v9", num_aborted=0)
    assert answer.meta.cached_device == 36 and answer.meta.weight_version == "v9"


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_new_label_ends_nothing_that_a_pause_holds(mode):
    """A trainer pauses, relabels and goes on: its rollouts must be there still."""
    driver = Driver()
    answer = driver.generate("a", prompt_of(20), 30)
    driver.turn(4)
    driver.send(PauseGeneration(call_id="p", mode=mode))
    wait_for(driver, "p")
    driver.send(SetWeightVersion(call_id="v", weight_version="v9", abort_all_requests=None))
    wait_for(driver, "v")
    assert driver.replies["v"].num_aborted == 0 and answer.finish is None
    driver.send(ContinueGeneration(call_id="c"))
    driver.finish()
    assert answer.finish.type == "length" and answer.tokens == expected(prompt_of(20), 30)


def test_a_new_label_ends_what_is_held_if_it_is_asked_to_and_counts_it():
    driver = Driver()
    answers = [driver.generate(name, prompt_of(20, seed), 30) for seed, name in enumerate("abc")]
    driver.turn(4)
    driver.send(PauseGeneration(call_id="p", mode="in_place"))
    wait_for(driver, "p")
    driver.send(SetWeightVersion(call_id="v", weight_version="v9", abort_all_requests=True))
    wait_for(driver, "v")
    assert driver.replies["v"].num_aborted == 3
    assert {answer.finish.type for answer in answers} == {"abort"}


def test_a_new_label_ends_nothing_that_waits_for_memory():
    driver = Driver()
    driver.send(ReleaseMemory(call_id="r"))
    wait_for(driver, "r")
    answer = driver.generate("a", prompt_of(20), 3)
    driver.send(SetWeightVersion(call_id="v", weight_version="v9", abort_all_requests=None))
    wait_for(driver, "v")
    assert driver.replies["v"].num_aborted == 0 and answer.finish is None
    driver.send(ResumeMemory(call_id="back"))
    driver.finish()
    assert answer.finish.type == "length" and answer.meta.weight_version == "v9"


def test_parameters_can_be_read_by_name():
    driver = Driver()
    driver.send(GetWeights(call_id="1", name="weight"))
    driver.send(GetWeights(call_id="2", name="nothing"))
    driver.turn()
    assert isinstance(driver.replies["1"], Weights)
    assert driver.replies["2"].status == 404


# --- memory ------------------------------------------------------------------------------------------


@BOTH
def test_release_queues_requests_until_resume_and_flush_answers_meanwhile(is_async):
    driver = Driver(is_async=is_async)
    prompt = prompt_of(40)
    driver.generate("a", prompt, 2)
    driver.finish()
    driver.send(ReleaseMemory(call_id="r"))
    driver.turn()
    released = driver.replies["r"]
    assert isinstance(released, MemoryResult) and released.released == ("kv_cache", "weights")
    queued = driver.generate("q", prompt, 4)
    driver.turn(5)
    assert queued.tokens == []
    driver.send(ReleaseMemory(call_id="r2"))
    driver.send(FlushCache(call_id="f", timeout_s=5.0))
    driver.turn()
    assert driver.replies["r2"].num_bytes == 0  # harmless
    assert driver.replies["f"].status == 200
    driver.send(ResumeMemory(call_id="m", tags=("weights",)))
    wait_for(driver, "m")
    assert driver.replies["m"].released == ("kv_cache",)
    driver.send(ResumeMemory(call_id="m2", tags=("kv_cache",)))
    driver.send(ResumeMemory(call_id="m3"))
    driver.finish()
    wait_for(driver, "m2", "m3")
    assert queued.meta.cached_device == 0 and queued.tokens == expected(prompt, 4)


def test_a_refused_release_names_the_blockers():
    driver = Driver()
    driver.generate("a", prompt_of(20), 50)
    driver.turn(2)
    driver.send(ReleaseMemory(call_id="r"))
    driver.turn()
    assert driver.replies["r"].blockers == {"running": 1} and driver.replies["r"].status == 400
    driver.finish()


@BOTH
def test_a_release_with_a_timeout_comes_through_under_load(is_async):
    driver = Driver(is_async=is_async, num_pages=128)
    first = driver.generate("a", prompt_of(20), 20)
    driver.turn(2)
    driver.send(ReleaseMemory(call_id="r", tags=("kv_cache",), timeout_s=100.0))
    later = [driver.generate(f"n{i}", prompt_of(20, i), 5) for i in range(5)]
    driver.finish(first)
    wait_for(driver, "r")
    assert isinstance(driver.replies["r"], MemoryResult)
    driver.send(ResumeMemory(call_id="m"))
    driver.finish()
    for i, answer in enumerate(later):
        assert answer.tokens == expected(prompt_of(20, i), 5)


def test_an_unknown_tag_is_refused_by_name():
    driver = Driver()
    driver.send(ReleaseMemory(call_id="r", tags=("cuda_graph",)))
    driver.turn()
    assert driver.replies["r"].param == "tags" and "kv_cache" in driver.replies["r"].message


def released(driver: Driver) -> None:
    driver.send(ReleaseMemory(call_id="r"))
    wait_for(driver, "r")


def test_a_resume_refuses_files_that_hold_other_weights_and_does_nothing():
    """A trainer writes each step into one folder: the next step must not serve under the label of the last."""
    driver = Driver()
    released(driver)
    waiting = driver.generate("a", prompt_of(12), 3)
    driver.runner.weights.on_disk = "w9"
    driver.send(ResumeMemory(call_id="back"))
    wait_for(driver, "back")
    failed = driver.replies["back"]
    assert isinstance(failed, Failed) and (failed.status, failed.param) == (409, "accept_changed_weights")
    assert "w0 was released, w9 found" in failed.message and "nothing was resumed" in failed.message
    assert driver.parts.control.released_memory == ("kv_cache", "weights"), "all or nothing"
    assert driver.runner.weights.is_released and driver.runner.kv_memory.is_released and waiting.finish is None
    assert "w9 found" in driver.parts.scheduler.why_refusing["changed_weights"]
    driver.runner.weights.on_disk = None  # the old files are back
    driver.send(ResumeMemory(call_id="again"))
    driver.finish()
    assert not driver.parts.scheduler.why_refusing
    result = driver.replies["again"]
    assert (result.weights_id, result.weight_version, result.has_changed_weights) == ("w0", "default", False)
    assert waiting.tokens == expected(prompt_of(12), 3) and waiting.meta.weight_version == "default"


def test_changed_files_that_are_accepted_get_their_own_id_and_no_label():
    driver = Driver()
    driver.generate("old", prompt_of(40), 2)
    driver.finish()
    driver.send(ReleaseMemory(call_id="r", tags=("weights",)))  # the KV stays: it must not match
    wait_for(driver, "r")
    driver.runner.weights.on_disk = "w9"
    driver.send(ResumeMemory(call_id="back", accept_changed_weights=True))
    wait_for(driver, "back")
    result = driver.replies["back"]
    assert (result.weights_id, result.weight_version, result.has_changed_weights) == ("w9", "", True)
    answer = driver.generate("new", prompt_of(40), 2)
    driver.finish()
    assert answer.meta.cached_device == 0 and answer.meta.weight_version == ""
    assert answer.tokens == expected(prompt_of(40), 2, "w9")


@pytest.mark.parametrize(
    "message", [UpdateWeights(call_id="u", path="w1", timeout_s=0.1), ResumeMemory(call_id="u", timeout_s=0.1)]
)
def test_weights_that_never_come_are_answered_in_time_and_given_up(message):
    """A thread that hangs in a read cannot be ended: nothing may wait for it, and the next update works."""
    driver = Driver()
    if isinstance(message, ResumeMemory):
        released(driver)
    driver.runner.weights.num_polls = 1 << 40
    driver.send(message)
    wait_for(driver, "u")
    assert isinstance(driver.replies["u"], Failed) and "not loaded in time" in driver.replies["u"].message
    assert driver.replies["u"].status == 408, "the caller's time was over: no fault of the server"
    assert driver.runner.weights.staged[-1].is_abandoned
    driver.runner.weights.num_polls = 3
    driver.send(UpdateWeights(call_id="next", path="w2"))
    wait_for(driver, "next")
    assert driver.replies["next"].weights_id == "w2"


def test_who_leaves_gives_its_weights_up():
    driver = Driver()
    driver.runner.weights.num_polls = 1 << 40
    driver.send(UpdateWeights(call_id="u", path="w1"))
    driver.turn(2)
    driver.send(CancelOperation(call_id="c", started_by_call="u"))
    wait_for(driver, "c")
    assert driver.runner.weights.staged[-1].is_abandoned
