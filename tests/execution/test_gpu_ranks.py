"""Two ranks of the asynchronous runner: this process and another, which gloo connects as NCCL does two GPUs."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_rank import CONFIGS, HAS_CARDS, LIMIT_S, gpu_runner, leave, ranked_gpu_runner, say
from ranked_models import VOCAB_SIZE
from step_driver import GREEDY, DrivenRequest, StepDriver

from headwater.devices.cuda.kernels import decode as triton_decode
from headwater.devices.cuda.products import linear as cuda_linear
from headwater.devices.kv_memory import KVMemory
from headwater.execution.pending_step import PendingStep
from headwater.messages.generation import LogprobParams, SamplingParams
from headwater.scheduling.plan import StepPlan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none"),
    # a wait in a GPU's driver takes no signal: a thread ends the process, and prints where it stands
    pytest.mark.timeout(LIMIT_S, method="thread" if HAS_CARDS else "signal"),
]

PROMPTS = [np.random.default_rng(3).integers(0, VOCAB_SIZE, length).tolist() for length in (5, 6, 2)]
DRAWN = SamplingParams(temperature=0.8, top_k=30, seed=5)
DRAWN_FROM_ALL = SamplingParams(temperature=2.0, seed=6)


@pytest.fixture(autouse=True)
def _few_interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rank 1 has it, and as test_gpu_runner.py does."""
    if HAS_CARDS:
        return
    monkeypatch.setattr(triton_decode, "split_limits", lambda *_: (2, 64))
    monkeypatch.setattr(cuda_linear, "suits", lambda *_: False)
    monkeypatch.setattr(cuda_linear, "suits_gated", lambda *_: False)


class TwoRanks:
    """Rank 0 here; every plan goes to rank 1 first."""

    def __init__(self, name: str, process: subprocess.Popen, rendezvous: Path) -> None:
        self._process = process
        self.runner = ranked_gpu_runner(name, 0, rendezvous)

    @property
    def kv(self) -> KVMemory:
        return self.runner.kv

    def launch(self, plan: StepPlan) -> PendingStep:
        say(0, f"launches {plan.num_rows} rows")
        assert self._process.stdin is not None
        pickle.dump(plan, self._process.stdin)
        self._process.stdin.flush()
        return self.runner.launch(plan)

    def leave(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        leave(0, self.runner)
        assert self._process.wait(LIMIT_S) == 0


@contextmanager
def rank_process(name: str, rendezvous: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, str(Path(__file__).with_name("gpu_rank.py")), name, str(rendezvous)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()
            if torch.distributed.is_initialized() and not HAS_CARDS:  # NCCL waits for a rank that is gone
                torch.distributed.destroy_process_group()


def _run(runner: Any, alone: list[DrivenRequest] | None = None) -> list[DrivenRequest]:
    """Greedy alone, then beside a draw from all tokens, rows that need all logits, and a row with a mask.

    At last two tokens of the first two, in one step with drafts if a run `alone` has written them before.
    """
    driver = StepDriver(runner)
    greedy = driver.add(PROMPTS[0], slot=0)
    driver.run([greedy], num_outputs=1, chunk=4)
    plain = driver.add(PROMPTS[2], slot=3, sampling=DRAWN_FROM_ALL)
    driver.run([greedy, plain], num_outputs=3)
    drawn = driver.add(PROMPTS[1], slot=1, sampling=DRAWN, logprobs=LogprobParams(top=2, prompt_start=0))
    driver.run([greedy, drawn], num_outputs=4)
    masked = driver.add(PROMPTS[2], slot=2, sampling=GREEDY)
    masked.mask = lambda num_outputs: (np.arange(7) == num_outputs % 7).astype(np.uint32) * 0x7FFF
    driver.run([greedy, drawn, masked, plain], num_outputs=5)
    if alone is None:
        driver.run([greedy, plain], num_outputs=7)
    else:
        drafts = {it.slot: it.outputs[5:6] for it in (alone[0], alone[3])}
        driver.step([(greedy, 1), (plain, 1)], drafts)
    return [greedy, drawn, masked, plain]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_write_the_text_of_one(name: str, tmp_path: Path) -> None:
    """Heads, columns and tokens of two ranks; tokens that rank 0 drew are on the device of rank 1 for the next step."""
    rendezvous = tmp_path / "rendezvous"
    with rank_process(name, rendezvous) as process:  # it imports meanwhile
        say(0, "computes alone")
        alone = _run(gpu_runner(name, ranks=None))
        ranks = TwoRanks(name, process, rendezvous)
        together = _run(ranks, alone)
        ranks.leave()
    assert [it.outputs for it in together] == [it.outputs for it in alone]
    assert len({token for it in alone for token in it.outputs}) > 4
    for one, other in zip(together, alone, strict=True):
        assert [it.top_ids for it in one.logprobs] == [it.top_ids for it in other.logprobs]
        assert [it.top_ids for it in one.prompt_logprobs] == [it.top_ids for it in other.prompt_logprobs]
