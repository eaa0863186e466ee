"""Which tokens end a request: those of the start, those of the weights in place, and its own."""

from typing import Any

import pytest

from engine_driver import CLIENT, Driver
from headwater.messages.base import pack_ids
from headwater.messages.generation import Generate, SamplingParams
from headwater.scheduling.request import Request
from headwater.scheduling.scheduler import Scheduler


@pytest.fixture
def scheduler() -> Scheduler:
    return Driver(eos_token_ids=(2, 3)).parts.scheduler


def added(scheduler: Scheduler, rid: str, **sampling: Any) -> Request:
    params = SamplingParams(max_new_tokens=4, **sampling)
    scheduler.add(Generate(rid=rid, prompt_ids=pack_ids([7, 8, 9]), sampling=params), client=CLIENT)
    return scheduler._requests[CLIENT, rid]


def test_ends_of_new_weights_are_added_and_go_with_them(scheduler: Scheduler) -> None:
    """An older policy's ends must not end a newer one's answers for ever."""
    waiting, stubborn = added(scheduler, "a"), added(scheduler, "b", ignore_eos=True, stop_token_ids=(11,))
    scheduler.begin_weights("w1", end_ids=(3, 5))
    assert waiting.stop_token_ids == {2, 3, 5}, "it will be answered by the new weights"
    assert stubborn.stop_token_ids == {11}
    assert added(scheduler, "c").stop_token_ids == {2, 3, 5}
    assert added(scheduler, "d", ignore_eos=True).stop_token_ids == set()
    scheduler.begin_weights("w2")
    assert added(scheduler, "e", stop_token_ids=(11,)).stop_token_ids == {2, 3, 11}
