"""A fleet that scales itself: slowly, between limits, and by what was needed all the time."""

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from headwater.fleet.autoscaling import Autoscaler, Limits, Scaling
from headwater.fleet.planned.virtual_loop import VirtualLoop
from headwater.generation.errors import ApiError

pytestmark = pytest.mark.anyio
LIMITS = Limits(min_replicas=1, max_replicas=4, target_ongoing_requests=10, upscale_after_s=3, downscale_after_s=5)


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio", {"loop_factory": VirtualLoop}


def steps(loads: Iterable[int], *, replicas: int = 1) -> list[int | None]:
    """What each second's look decides."""
    autoscaler = Autoscaler(LIMITS, replicas=replicas)
    return [autoscaler.look(num_ongoing=load, now_s=float(second)) for second, load in enumerate(loads)]


def test_it_grows_to_what_was_needed_all_the_time_and_no_further_than_it_may() -> None:
    assert steps([25, 90, 35, 21]) == [None, None, None, 3]
    assert steps([900] * 4) == [None, None, None, 4]


def test_a_short_peak_changes_nothing() -> None:
    assert not any(steps([90, 90, 5, 90, 90, 5]))
    assert not any(steps([0, 0, 0, 0, 35, 0, 0, 0, 0], replicas=3))  # nor does a short rest


def test_it_shrinks_to_the_most_that_was_needed_meanwhile() -> None:
    assert steps([15, 0, 0, 0, 0, 0], replicas=4) == [None] * 5 + [2]
    assert steps([0] * 6, replicas=2) == [None] * 5 + [1]


@pytest.mark.parametrize("fields", [{"min_replicas": 3, "max_replicas": 2}, {"max_replicas": 2, "min_replicas": 0},
                                    {"max_replicas": 2, "target_ongoing_requests": 0}])  # fmt: skip
def test_limits_that_contradict_each_other_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"replicas|target"):
        Limits(**fields)  # type: ignore[arg-type]


async def test_a_number_that_could_not_be_set_is_tried_again_and_a_command_ends_it_all() -> None:
    asked: list[int] = []

    async def scale(replicas: int) -> None:
        asked.append(replicas)
        if len(asked) == 1:
            raise ApiError(409, "not now")

    num_replicas = 0
    scaling = Scaling(scale, num_ongoing=lambda: 99, num_replicas=lambda: num_replicas)
    await scaling.look()
    assert scaling.facts is None and not asked
    scaling.adapt(Limits(max_replicas=2, target_ongoing_requests=1, upscale_after_s=0))
    await scaling.look()
    assert not asked  # no replica has been met yet
    num_replicas = 1
    for _ in range(3):
        await scaling.look()
        await asyncio.sleep(0)
    assert asked == [2, 2] and scaling.facts is not None and scaling.facts["wanted"] == 2
    await scaling.fix(1)
    await scaling.look()
    assert asked == [2, 2, 1] and scaling.facts is None
