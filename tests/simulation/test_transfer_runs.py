"""Trainers that send tensors in virtual time: random runs keep every promise, and mutants are caught."""

from collections import Counter

import pytest

from headwater.simulation.fleet.run import fleet_run
from headwater.simulation.fleet.transfer_run import FIRST_WITH_MORE, TransferRun
from headwater.simulation.mutants.transports import TRANSPORT_MUTANTS, hunt_transport

TROUBLES = ["slow", "torn", "misfit", "repeated", "reordered", "overdue", "died after a bucket", "caller left"]
WITHIN = [
    f"{name} within"
    for name in ("flush", "PauseGeneration", "ReleaseMemory", "ResumeMemory", "UpdateWeights", "LoadAdapter")
]


def test_fixed_seeds_with_brackets_that_end_and_that_do_not() -> None:
    runs: list[TransferRun] = []

    def kind(seed: int) -> TransferRun:
        runs.append(TransferRun(seed))
        return runs[-1]

    for seed in (0, 1, 2, FIRST_WITH_MORE, FIRST_WITH_MORE + 1):
        result = fleet_run(seed, num_turns=800, kind=kind)
        assert result.failure is None, result.failure
    trainers = [trainer for run in runs for trainer in run.trainers]
    assert sum(trainer.num_ended for trainer in trainers) > 3
    assert sum(trainer.num_refused for trainer in trainers) > 20
    seen = sum((run.seen for run in runs), Counter())
    assert not {*TROUBLES, *WITHIN} - seen.keys(), seen
    visible = {says.weights for run in runs for _, says in run.server.history if says.weights.startswith("sent")}
    assert len(visible) > 5


@pytest.mark.slow
@pytest.mark.parametrize("mutant", TRANSPORT_MUTANTS.values(), ids=lambda mutant: mutant.name)
def test_every_mutant_of_transports_is_caught(mutant) -> None:
    verdict = hunt_transport(mutant, max_turns=20_000)
    assert verdict.promise is not None, f"{mutant.breaks} Not noticed in {verdict.num_turns} turns"
