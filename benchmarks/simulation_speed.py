#!/usr/bin/env python3
"""The simulation's turns per second in two source trees, and their ratio, by profile.

    simulation_speed.py OLD NEW [--profiles mixed,calm] [--seeds 3-18] [--turns 1000] [--repeat 3]

OLD and NEW are checkouts; NEW may be `.`. One process for each tree plays the same seeds. The two alternate run by run,
so that other load on the machine affects both. The script compares CPU time, not wall time, and takes the shortest time
of repeated runs, since a busy neighbour on a shared core also increases CPU time.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

PROFILES = "mixed,calm,flush,training,tiers,store,rough,crashes"
# Reads lines "profile seed turns", and answers each with the turns played and their CPU seconds.
_PLAYER = """
import sys, time
try:
    from headwater.simulation.random_runs.profiles import find_profile
    from headwater.simulation.random_runs.run import random_run
except ModuleNotFoundError:  # where they were before
    from headwater.simulation.profiles import find_profile
    from headwater.simulation.random_run import random_run
for line in sys.stdin:
    profile, seed, num_turns = line.split()
    started_s = time.process_time()
    result = random_run(int(seed), profile=find_profile(profile), num_turns=int(num_turns))
    assert result.failure is None, result.failure
    print(result.num_turns, time.process_time() - started_s, flush=True)
"""


class Player:
    """A process that plays runs from one source tree."""

    def __init__(self, tree: Path) -> None:
        if not (tree / "src" / "headwater").is_dir():
            raise SystemExit(f"{tree} holds no src/headwater")
        environment = os.environ | {"PYTHONPATH": str(tree.resolve() / "src")}
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", _PLAYER]
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def play(self, profile: str, seed: int, *, num_turns: int) -> tuple[int, float]:
        """The turns played (a few more than `num_turns`, until the run has ended) and the CPU seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(profile, seed, num_turns, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline().split()
        if len(answer) != 2:
            raise SystemExit(f"seed {seed} of {profile} failed, see above")
        return int(answer[0]), float(answer[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs=2, type=Path, metavar="TREE", help="the old checkout and the new one")
    parser.add_argument("--profiles", default=PROFILES, help="with commas between; what both trees know")
    parser.add_argument("--seeds", default="3-18", help="first and last")
    parser.add_argument("--turns", type=int, default=1000, help="of each run")
    parser.add_argument("--repeat", type=int, default=1, help="times that each run is played")
    arguments = parser.parse_args()
    first, last = map(int, arguments.seeds.split("-"))
    players = [Player(tree) for tree in arguments.trees]
    for player in players:
        player.play("mixed", first, num_turns=arguments.turns)  # excludes imports and cold caches from the measurement
    total = [[0, 0.0], [0, 0.0]]
    print(f"{'profile':<10}{'old turns/s':>12}{'new turns/s':>12}{'ratio':>7}")
    for profile in arguments.profiles.split(","):
        played = [[0, 0.0], [0, 0.0]]
        for seed in range(first, last + 1):
            best = _shortest(players, profile, seed, num_turns=arguments.turns, num_times=arguments.repeat)
            for sums in (played, total):
                for each, (num_turns, cpu_s) in zip(sums, best, strict=True):
                    each[0] += num_turns
                    each[1] += cpu_s
        _tell(profile, played)
    _tell("all", total)


def _shortest(
    players: list[Player], profile: str, seed: int, *, num_turns: int, num_times: int
) -> list[tuple[int, float]]:
    """Turns and least CPU seconds of one run, for each player."""
    times = [[player.play(profile, seed, num_turns=num_turns) for player in players] for _ in range(num_times)]
    return [min(results, key=lambda result: result[1]) for results in zip(*times, strict=True)]


def _tell(name: str, played: list[list[float]]) -> None:
    old, new = (num_turns / cpu_s for num_turns, cpu_s in played)
    print(f"{name:<10}{old:>12,.0f}{new:>12,.0f}{new / old:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
