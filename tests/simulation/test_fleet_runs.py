"""Several engines in virtual time: random runs keep every promise, known-wrong servers do not get through."""

import functools
import os
import time

import pytest

from headwater.simulation.fleet.run import fleet_run
from headwater.simulation.mutants.fleet import FLEET_MUTANTS, hunt_fleet

FRESH_S = float(os.environ.get("HEADWATER_SIMULATION_S", "4")) / 2  # half of what one engine gets


fixed_run = functools.cache(functools.partial(fleet_run, num_turns=1500))


@pytest.mark.parametrize("seed", range(8))
def test_fixed_seeds(seed: int) -> None:
    assert fixed_run(seed).failure is None, fixed_run(seed).failure


@pytest.mark.random
def test_a_fresh_seed_every_time(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("HEADWATER_SIMULATION_SEED") or time.time_ns() % 10**9)
    until_s = time.monotonic() + FRESH_S
    with capsys.disabled():
        print(f"\nheadwater simulate --fleet --seed {seed} --turns 1500")
    while time.monotonic() < until_s:
        result = fleet_run(seed, num_turns=1500)
        assert result.failure is None, f"--fleet --seed {seed}: {result.failure}"
        seed += 1


def test_runs_repeat_exactly_and_do_what_they_are_for() -> None:
    assert fleet_run(2, num_turns=1500) == fixed_run(2)
    total = [fixed_run(seed) for seed in range(8)]
    assert sum(result.num_decided for result in total) > 75
    assert sum(result.num_requests for result in total) > 300
    assert sum(result.num_deaths for result in total) > 7


@pytest.mark.slow
@pytest.mark.mutants
@pytest.mark.parametrize("mutant", FLEET_MUTANTS.values(), ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught(mutant) -> None:
    """A check that misses one of these would miss the real thing, too."""
    verdict = hunt_fleet(mutant, max_turns=250_000)
    assert verdict.promise is not None, f"{mutant.breaks} Not noticed in {verdict.num_turns} turns"


def test_mutants_leave_no_trace() -> None:
    for mutant in FLEET_MUTANTS.values():
        with mutant.in_force():
            pass
    assert fleet_run(3, num_turns=300).failure is None
