"""Many random runs, on one core or several."""

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass

from headwater.simulation.random_runs.profiles import PROFILES, find_profile
from headwater.simulation.random_runs.run import RunResult, random_run

ALL_PROFILES = "all"


@dataclass(frozen=True, slots=True)
class Campaign:
    """`num_runs` runs from `first_seed` on. Raises ValueError for invalid values."""

    first_seed: int
    num_runs: int
    turns_per_run: int
    profile: str = ALL_PROFILES  # or one name; with all, the seed determines the profile
    num_jobs: int = 1

    def __post_init__(self) -> None:
        for name, least in (("first_seed", 0), ("num_runs", 1), ("turns_per_run", 1), ("num_jobs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if self.profile != ALL_PROFILES:
            find_profile(self.profile)

    def profile_of(self, seed: int) -> str:
        """The profile of a seed, the same in every campaign over all profiles."""
        names = list(PROFILES)
        return names[seed % len(names)] if self.profile == ALL_PROFILES else self.profile


def run_campaign(campaign: Campaign, *, on_turns: Callable[[int], None] | None = None) -> Iterator[RunResult]:
    """Yield results as they arrive, not in the order of seeds. `on_turns` gets the turns since its last call."""
    seeds = range(campaign.first_seed, campaign.first_seed + campaign.num_runs)
    if campaign.num_jobs == 1:
        collect_rarely()
        for seed in seeds:
            yield _run(seed, campaign.profile_of(seed), campaign.turns_per_run, on_turns)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(campaign.num_jobs, mp_context=context, initializer=collect_rarely) as pool:
        waiting: set[Future[RunResult]] = set()
        for seed in seeds:  # only a few ahead, so that an early stop discards little
            waiting.add(pool.submit(_run, seed, campaign.profile_of(seed), campaign.turns_per_run))
            if len(waiting) >= 2 * campaign.num_jobs:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from _collect(done, on_turns)
        yield from _collect(wait(waiting).done, on_turns)


def collect_rarely() -> None:
    """Make this process collect garbage less often: trees live for a whole run, and requests are few."""
    gc.set_threshold(20_000, 20, 20)


def _collect(done: set[Future[RunResult]], on_turns: Callable[[int], None] | None) -> Iterator[RunResult]:
    for future in done:
        result = future.result()
        if on_turns is not None:
            on_turns(result.num_turns)
        yield result


def _run(seed: int, profile: str, num_turns: int, on_turns: Callable[[int], None] | None = None) -> RunResult:
    return random_run(seed, profile=PROFILES[profile], num_turns=num_turns, on_turns=on_turns)
