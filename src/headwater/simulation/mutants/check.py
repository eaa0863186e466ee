"""Checks that random runs notice every mutant, and how soon: `python -m headwater.simulation.mutants.check`.

Each hunt begins at seed 0, so that the figures are not those of chosen seeds.
"""

import sys

from headwater.simulation.mutants import adapters as mutants_of_adapters  # noqa: F401  they register themselves
from headwater.simulation.mutants import answers as mutants_of_answers  # noqa: F401  they register themselves
from headwater.simulation.mutants import cache as mutants_of_cache  # noqa: F401  they register themselves
from headwater.simulation.mutants import engine as mutants_of_engine  # noqa: F401  they register themselves
from headwater.simulation.mutants import files as mutants_of_files  # noqa: F401  they register themselves
from headwater.simulation.mutants import flush_counts as mutants_of_flush_counts  # noqa: F401  they register themselves
from headwater.simulation.mutants import grammars as mutants_of_grammars  # noqa: F401  they register themselves
from headwater.simulation.mutants import limits as mutants_of_limits  # noqa: F401  they register themselves
from headwater.simulation.mutants import parts as mutants_of_parts  # noqa: F401  they register themselves
from headwater.simulation.mutants import paths as mutants_of_paths  # noqa: F401  they register themselves
from headwater.simulation.mutants import pins as mutants_of_pins  # noqa: F401  they register themselves
from headwater.simulation.mutants import ranks as mutants_of_ranks  # noqa: F401  they register themselves
from headwater.simulation.mutants import rules as mutants_of_rules  # noqa: F401  they register themselves
from headwater.simulation.mutants import speculation as mutants_of_speculation  # noqa: F401  they register themselves
from headwater.simulation.mutants import sums as mutants_of_sums  # noqa: F401  they register themselves
from headwater.simulation.mutants.registry import MUTANTS, Mutant, Verdict
from headwater.simulation.random_runs.profiles import PROFILES
from headwater.simulation.random_runs.run import random_run

TURNS_PER_RUN = 1500
_MAX_TURNS = 200_000


def all_mutants() -> list[Mutant]:
    return list(MUTANTS.values())


def hunt(mutant: Mutant, *, max_turns: int, first_seed: int | None = None) -> Verdict:
    """Play runs with `mutant` in force until a promise is broken, for at most about `max_turns` turns.

    `first_seed` of None is the seed of an early meeting.
    """
    first_seed = mutant.seed if first_seed is None else first_seed
    num_turns = num_runs = 0
    while num_turns < max_turns:
        with mutant.in_force():
            result = random_run(first_seed + num_runs, profile=PROFILES[mutant.profile], num_turns=TURNS_PER_RUN)
        num_runs += 1
        if result.failure is not None:
            return Verdict(mutant.name, result.failure.promise, num_turns + result.failure.turn, num_runs)
        num_turns += result.num_turns
    return Verdict(mutant.name, None, num_turns, num_runs)


def main() -> int:
    """Print a Markdown table of all mutants. Exit status 1 if one was not noticed."""
    print("| what is broken | profile | noticed as | turns | runs |\n|---|---|---|---|---|")
    has_missed = False
    for mutant in all_mutants():
        verdict = hunt(mutant, max_turns=_MAX_TURNS, first_seed=0)
        has_missed |= verdict.promise is None
        found = f"`{verdict.promise}`" if verdict.promise else "**not noticed**"
        turns = f"{verdict.num_turns:,}"
        print(f"| {mutant.breaks} | {mutant.profile} | {found} | {turns} | {verdict.num_runs} |", flush=True)
    return int(has_missed)


if __name__ == "__main__":
    sys.exit(main())
