"""Shows that random runs notice every mutant, and how soon."""

from headwater.simulation import mutants_of_cache, mutants_of_engine  # noqa: F401  they register themselves
from headwater.simulation.mutants import MUTANTS, Mutant, Verdict
from headwater.simulation.profiles import PROFILES
from headwater.simulation.random_run import random_run

TURNS_PER_RUN = 1500


def all_mutants() -> list[Mutant]:
    return list(MUTANTS.values())


def hunt(mutant: Mutant, *, max_turns: int, first_seed: int = 0) -> Verdict:
    """Play runs with `mutant` in force until a promise is broken, or `max_turns` have gone by."""
    num_turns = num_runs = 0
    while num_turns < max_turns:
        with mutant.in_force():
            result = random_run(first_seed + num_runs, profile=PROFILES[mutant.profile], num_turns=TURNS_PER_RUN)
        num_runs += 1
        if result.failure is not None:
            return Verdict(mutant.name, result.failure.promise, num_turns + result.failure.turn, num_runs)
        num_turns += result.num_turns
    return Verdict(mutant.name, None, num_turns, num_runs)
