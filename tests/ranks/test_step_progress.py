"""How far ranks are, and which of them is found to hang."""

import pytest

from headwater.ranks.step_progress import StepProgress, StepWatch


class Handle:
    is_over = False

    def is_done(self) -> bool:
        return self.is_over


def test_steps_count_as_ended_when_the_device_has_done_them() -> None:
    """On a GPU a step follows the other: at no look has the newest ended."""
    progress, handles = StepProgress(), [Handle() for _ in range(4)]
    assert progress.look() == (0, 0)
    for number, handle in enumerate(handles[:3], start=1):
        progress.begin()
        progress.launched(handle)  # type: ignore[arg-type]
        assert progress.look() == (number - 1, number)
        handle.is_over = True
    assert progress.look() == (3, 3)
    progress.begin()
    assert progress.look() == (3, 3), "it is not launched"
    progress.launched(handles[3])  # type: ignore[arg-type]
    assert progress.look() == (3, 4)
    progress.begin()
    progress.launched(None)
    assert progress.look() == (5, 5), "a step that failed is over, and so are those before it"


def stuck(*positions: tuple[int, ...], limit_s: float = 10.0, num_begun: int = 8) -> tuple[int, str] | None:
    """What is found if the ranks stay where they are."""
    watch = StepWatch(limit_s=limit_s)
    found = [watch.find(now_s, num_begun, positions) for now_s in (100.0, 105.0, 110.0, 111.0)]
    assert found[:3] == [None] * 3
    return found[3]


def test_the_rank_that_is_furthest_behind_is_the_one_that_hangs() -> None:
    said = "has not finished a step for 11.0 s (--rank-timeout)"
    assert stuck((7, 8, 41), (7, 7, 40), (7, 8, 41)) == (1, said), "the others wait in a sum"
    assert stuck((7, 8), (7, 8), (7, 7)) == (2, said)
    assert stuck((8, 8), (7, 8)) == (1, said), "rank 0 has done its part"
    assert stuck((7, 7), (7, 8)) == (0, said)
    assert stuck((7, 8), (7, 8)) == (1, "and rank 0 have not finished a step for 11.0 s (--rank-timeout)")
    said = "and rank 2 and rank 3 have not finished a step for 11.0 s (--rank-timeout)"
    assert stuck((7, 8, 41), *[(7, 7, 40)] * 3) == (1, said)
    assert stuck((7, 8), (8, 8), (8, 8)) is None, "the loop asks for rank 0's steps"
    assert stuck((8, 8), (8, 8)) is None


@pytest.mark.parametrize("moved", [(7, 8, 41), (8, 8, 40)])
def test_a_rank_that_moves_within_a_step_or_to_the_next_one_does_not_hang(moved: tuple[int, ...]) -> None:
    """A prompt of a large model takes minutes on a CPU."""
    watch = StepWatch(limit_s=10.0)
    watch.find(100.0, 9, [(7, 8, 40), (7, 8, 40)])
    assert watch.find(109.0, 9, [(7, 8, 40), moved]) is None
    assert watch.find(118.0, 9, [(7, 8, 40), moved]) is None
    assert watch.find(120.0, 9, [(7, 8, 40), moved]) is not None


def test_the_time_without_steps_does_not_count() -> None:
    watch = StepWatch(limit_s=10.0)
    for now_s, num_begun in ((0.0, 8), (50.0, 8), (60.0, 9), (69.0, 9)):
        assert watch.find(now_s, num_begun, [(8, 8), (8, 8)]) is None
    assert watch.find(71.0, 9, [(8, 8), (8, 8)]) is not None
