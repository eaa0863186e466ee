"""How long drafts are: they follow how often they are right and what a row costs, and come back after they were off."""

from itertools import pairwise

import pytest

from headwater.scheduling.speculation.acceptance import Acceptance, StepCost, best_length

CHEAP = {"num_rows": 1, "row_share": 0.05}
DEAR = {"num_rows": 1, "row_share": 0.3}


def test_drafts_that_are_right_grow_and_those_that_are_wrong_shrink_to_none():
    acceptance = Acceptance(0.5)
    first = acceptance.length(12, **CHEAP)
    for _ in range(20):
        acceptance.accepted()
    assert acceptance.length(12, **CHEAP) == 12 > first > 0
    for _ in range(30):
        acceptance.rejected()
    assert acceptance.length(12, **CHEAP) == 0


def test_a_dearer_row_makes_drafts_shorter():
    lengths = [Acceptance(0.8).length(31, num_rows=1, row_share=share) for share in (0.02, 0.1, 0.5, 0.79, 0.81)]
    assert lengths == sorted(lengths, reverse=True) and lengths[-2:] == [1, 0]


@pytest.mark.parametrize("num_rows", [1, 4, 16])
@pytest.mark.parametrize("row_share", [0.05, 0.2, 0.7])
@pytest.mark.parametrize("rate", [0.2, 0.6, 0.9, 0.98])
def test_the_length_is_the_one_with_the_most_tokens_a_second(num_rows, row_share, rate):
    def speed(length: int) -> float:
        tokens = num_rows + sum(rate**place for place in range(1, length + 1))
        return tokens / (1 + length * row_share / num_rows)

    best = max(speed(length) for length in range(13))
    assert speed(best_length(rate, 12, num_rows=num_rows, row_share=row_share)) == pytest.approx(best)


def test_drafts_that_are_off_are_tried_again_ever_more_rarely():
    acceptance = Acceptance(0.01)
    tries = []
    for token in range(2000):
        if acceptance.length(12, **DEAR):
            tries.append(token)
            acceptance.rejected()
    gaps = [later - before for before, later in pairwise(tries)]
    assert tries[0] < 40 and gaps == sorted(gaps) and gaps[-1] >= 500


def test_a_trial_that_is_right_turns_drafts_on_again():
    acceptance = Acceptance(0.01)
    assert any(acceptance.length(12, **DEAR) for _ in range(40))
    for _ in range(3):
        acceptance.accepted()
        assert acceptance.length(12, **DEAR) > 0


@pytest.mark.parametrize(("base_s", "row_s"), [(0.06, 0.004), (0.02, 0.02), (0.001, 0.0)])
def test_the_cost_of_a_row_follows_from_the_times_of_steps(base_s, row_s):
    cost = StepCost()
    for number in range(400):
        rows = 1 + number % 9
        cost.saw(rows, base_s + row_s * rows)
    for rows in (1, 8, 16):
        share = row_s * rows / (base_s + row_s * rows)
        assert cost.row_share(rows) == pytest.approx(share, abs=0.05)


def test_steps_of_one_size_and_steps_without_time_leave_the_first_guess():
    cost = StepCost()
    before = cost.row_share(4)
    for _ in range(50):
        cost.saw(4, 0.05)
        cost.saw(4, 0.0)
    assert cost.row_share(4) == before


def test_one_slow_step_changes_little():
    cost = StepCost()
    for number in range(200):
        cost.saw(1 + number % 8, 0.05 + 0.002 * (1 + number % 8))
    before = cost.row_share(1)
    cost.saw(8, 60.0)
    assert cost.row_share(1) < before + 0.25
