"""Engines that are wrong in known ways do not get through: each breaks a promise within so many turns."""

from dataclasses import replace

import pytest

from headwater.simulation.mutants.check import TURNS_PER_RUN, all_mutants, hunt
from headwater.simulation.random_runs.profiles import PROFILES
from headwater.simulation.random_runs.run import random_run
from headwater.simulation.random_runs.shrink import shrink

pytestmark = [pytest.mark.slow, pytest.mark.mutants]
MAX_TURNS = 150_000
_turns_played: dict[tuple[str, int], int] = {}  # by profile and seed: the turns in which mutants were caught


def test_there_are_enough():
    assert len(all_mutants()) >= 15


@pytest.mark.parametrize("mutant", all_mutants(), ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught(mutant):
    """A check that misses one of these would miss the real thing, too."""
    verdict = hunt(mutant, max_turns=MAX_TURNS)
    print(f"{mutant.name}: {verdict.promise} after {verdict.num_turns} turns in {verdict.num_runs} runs")
    assert verdict.promise is not None, f"{mutant.breaks} Not noticed in {verdict.num_turns} turns"
    run = (mutant.profile, mutant.seed)
    _turns_played[run] = max(_turns_played.get(run, 0), min(verdict.num_turns, TURNS_PER_RUN))


@pytest.mark.parametrize(
    ("profile", "seed"), sorted({(mutant.profile, mutant.seed) for mutant in all_mutants()}), ids=str
)
def test_the_true_code_keeps_every_promise_in_the_same_runs(profile, seed):
    """Else a mutant is caught by something that it has not broken."""
    num_turns = _turns_played.get((profile, seed), TURNS_PER_RUN) + 1
    result = random_run(seed, profile=PROFILES[profile], num_turns=num_turns)
    assert result.failure is None, result.failure.message


@pytest.mark.parametrize("name", [mutant.name for mutant in all_mutants() if mutant.profile == "ranks"])
def test_the_books_of_eight_ranks_are_checked(name):
    """A rank that goes astray shows among eight as among two."""
    (mutant,) = [mutant for mutant in all_mutants() if mutant.name == name]
    eight = replace(PROFILES["ranks"], num_ranks=(8, 8))
    with mutant.in_force():
        runs = (random_run(mutant.seed + number, profile=eight, num_turns=TURNS_PER_RUN) for number in range(6))
        assert any(run.failure is not None for run in runs), mutant.breaks


def test_mutants_leave_no_trace():
    """The engine is right again when a mutant is over; else every later test would fail."""
    for mutant in all_mutants():
        with mutant.in_force():
            pass
    assert random_run(3, profile=PROFILES["mixed"], num_turns=200).failure is None


def test_a_failing_run_is_cut_down_to_what_it_takes():
    (mutant,) = [mutant for mutant in all_mutants() if mutant.name == "publish_limit_is_skipped"]
    with mutant.in_force():
        failure = random_run(0, profile=PROFILES["flush"], num_turns=1500).failure
        shorter = shrink(failure, may_go_on=lambda num_events: True)
    assert shorter.promise == failure.promise
    assert len(shorter.trace.events) <= 8 < len(failure.trace.events)
