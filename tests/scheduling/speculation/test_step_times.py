"""What drafts cost a runner that is a step ahead without them: all that a step with drafts takes longer."""

import numpy as np
import pytest

from headwater.scheduling.plan import NEWEST_TOKEN, StepPlan
from headwater.scheduling.speculation.step_times import StepTimes


def plan(num_requests: int, num_drafted: int = 0, *, num_prompts: int = 0) -> StepPlan:
    """`num_drafted` tokens are drafted for the first request."""
    slots = [0] * num_drafted + list(range(num_requests + num_prompts))
    num_rows = len(slots)
    return StepPlan(
        step_id=0,
        assignments=(),
        page_updates=(),
        slots=np.array(slots, dtype=np.int32),
        uses=np.ones(num_rows, dtype=np.int64),
        num_computed=np.zeros(num_rows, dtype=np.int32),
        num_tokens=np.ones(num_rows, dtype=np.int32),
        samples=np.ones(num_rows, dtype=np.bool_),
        token_ids=np.full(num_rows, NEWEST_TOKEN, dtype=np.int32),
        num_decodes=num_rows - num_prompts,
        num_outputs=np.zeros(num_rows, dtype=np.int32),
    )


class Device:
    """Takes `plain_s` for a step, and `slower_s` more with drafts, which the host plans in `host_s` when it is idle."""

    def __init__(self, times: StepTimes, *, plain_s: float = 0.004, slower_s: float = 0.001, host_s: float = 0.001):
        self.times, self.now_s = times, 10.0
        self.plain_s, self.slower_s, self.host_s = plain_s, slower_s, host_s

    def ahead(self, count: int, num_requests: int) -> None:
        """Each step is planned while the one before it is computed. The first and the last are of no prompts alone."""
        first = plan(num_requests, num_prompts=1)
        self.times.planned(self.now_s)
        for number in range(count):
            self.times.planned(self.now_s + self.host_s)
            self.now_s += self.plain_s
            self.times.ended(first if not number else plan(num_requests), self.now_s)
        self.now_s += self.plain_s
        self.times.ended(plan(num_requests), self.now_s)

    def drafted(self, count: int, num_requests: int, *, pause_s: float = 0.0) -> None:
        for number in range(count):
            self.now_s += self.host_s + pause_s
            self.times.planned(self.now_s)
            self.now_s += self.plain_s + self.slower_s
            self.times.ended(plan(num_requests, 1 + number % 7), self.now_s)


def test_a_runner_that_is_never_ahead_has_no_jump():
    device = Device(StepTimes())
    device.drafted(50, 4)
    assert device.times.jump(4) == 0.0


@pytest.mark.parametrize("num_requests", [1, 8])
def test_the_jump_is_what_a_step_with_drafts_takes_longer_in_tokens(num_requests):
    """2 ms of 4: one of them the device's, one that the device waits for the host."""
    device = Device(StepTimes())
    device.ahead(20, num_requests)
    device.drafted(30, num_requests)
    assert device.times.jump(num_requests) == pytest.approx(0.5 * num_requests, rel=0.05)
    device.drafted(100, num_requests, pause_s=5.0)  # nobody asked for anything meanwhile
    assert device.times.jump(num_requests) == pytest.approx(0.25 * num_requests, rel=0.05)


def test_a_few_steps_with_drafts_say_nothing_yet():
    device = Device(StepTimes())
    device.ahead(20, 1)
    device.drafted(3, 1)
    assert device.times.jump(1) == 0.0


def test_drafts_that_were_slow_once_are_tried_again():
    device = Device(StepTimes(), slower_s=0.1)
    device.ahead(20, 1)
    device.drafted(30, 1)
    assert device.times.jump(1) == 1.0
    device.ahead(400, 1)
    assert device.times.jump(1) == 1.0
    device.ahead(100, 1)
    assert device.times.jump(1) == 0.0


def test_steps_without_drafts_are_measured_first_for_each_size_and_again_later():
    device = Device(StepTimes())
    assert device.times.needs_plain(1)
    device.ahead(3, 1)
    assert not device.times.needs_plain(1) and device.times.needs_plain(4)
    device.drafted(400, 1)
    assert device.times.needs_plain(1)
    device.ahead(3, 1)
    assert not device.times.needs_plain(1)


def test_a_step_that_failed_keeps_the_order_of_the_others():
    device = Device(StepTimes())
    device.ahead(20, 1)
    device.times.planned(device.now_s)
    device.times.failed(device.now_s + 3.0)
    device.now_s += 3.0
    device.drafted(30, 1)
    assert device.times.jump(1) == pytest.approx(0.5, rel=0.05)
