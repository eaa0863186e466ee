"""64 streams while two known sets of weights replace one another: every token is the one that its label names."""

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from running_server import RunningServer

sys.path.append(str(Path(__file__).parents[3] / "integrations"))
sys.path.append(str(Path(__file__).parents[3] / "integrations" / "training"))

from weights_oracle import SETS, Rollouts, bodies_of, judge, two_sets, write_model

pytestmark = [pytest.mark.slow, pytest.mark.oracle]
NUM_STREAMS, NUM_UPDATES = 64, 4


@pytest.mark.timeout(900)  # 64 streams, on a machine that may be busy
def test_no_token_is_lost_or_stale_across_updates(tmp_path: Path) -> None:
    write_model(tmp_path)
    models = two_sets(tmp_path)
    arguments = ("--dtype", "float32", "--max-running-requests", str(NUM_STREAMS + 1), "--max-total-tokens", "262144")
    with RunningServer("--model", str(tmp_path), *arguments, "--chunked-prefill-size", "8192") as server:
        server.wait_healthy()
        rollouts = Rollouts(server.url, num_streams=NUM_STREAMS, vocab_size=models["A"].config.vocab_size)
        asyncio.run(rollouts.run(bodies_of(models, torch.float32), num_updates=NUM_UPDATES))
    verdict = judge(rollouts, models, max_difference=1e-3)
    assert verdict.problems == []
    assert verdict.num_spans == NUM_STREAMS * (NUM_UPDATES + 1)
    # the judge sees what it is there for: one token too many or too few of the new weights, and the wrong set
    spans = rollouts.streams[0].metadata["weights_versions"]
    for change in (
        [[label, first + (1 if number == 2 else 0)] for number, (label, first) in enumerate(spans)],
        [[label, first - (1 if number == 2 else 0)] for number, (label, first) in enumerate(spans)],
        [*spans[:2], ["A-9", spans[2][1]], *spans[3:]],
    ):
        rollouts.streams[0].metadata["weights_versions"] = change
        assert judge(rollouts, models, max_difference=1e-3).problems, change
    rollouts.streams[0].metadata["weights_versions"] = spans
    swapped = dict(zip(SETS, reversed(list(models.values())), strict=True))
    assert len(judge(rollouts, swapped, max_difference=1e-3).problems) >= NUM_STREAMS
