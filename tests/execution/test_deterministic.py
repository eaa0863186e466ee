"""A device that is deterministic: a request's bits are the same alone, in a batch, in chunks, behind a prefix, scored.

Interpreted, the kernels' sums are numpy's; benchmarks/gpu/deterministic_run.py shows the same of a card's.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from step_driver import DrivenRequest, StepDriver
from transformers import PreTrainedModel

from headwater.devices.cuda.device import CudaDevice
from headwater.devices.errors import UnsupportedError
from headwater.execution.gpu_runner import GpuRunner
from headwater.messages.generation import LogprobParams, SamplingParams
from headwater.models.loader import load_model, resolve_model
from interpreted_triton import exact_dots
from tiny_models import VOCAB_SIZE, greedy_text, make_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # of padding
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]
PROMPT = np.random.default_rng(1).integers(3, VOCAB_SIZE, 13).tolist()
NUM_OUTPUTS = 3
ASKED = LogprobParams(top=2, prompt_start=0)


@pytest.fixture(autouse=True)
def _exact_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        exact_dots(monkeypatch)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, make_tiny_model("qwen3", folder, num_layers=2)


def place() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def driver(folder: Path, *, prompts: Sequence[tuple[int, int]] = ((0, 16),)) -> StepDriver:
    device = CudaDevice(place(), is_deterministic=True)
    loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32")
    layout = loaded.kv_layout(page_size=4)
    runner = GpuRunner(
        loaded, device, layout=layout, num_pages=64, max_running=8, max_context=64, prompt_graph_sizes=prompts
    )
    return StepDriver(runner)  # type: ignore[arg-type]


def bits(request: DrivenRequest) -> list[tuple[int, float, tuple[float, ...]]]:
    """Tokens and log-probabilities, of the prompt's tokens too."""
    told = [*request.prompt_logprobs, *request.logprobs]
    return [(it.token_id, it.logprob, it.top_logprobs) for it in told]


def test_bits_do_not_depend_on_the_batch_on_chunks_or_on_what_is_cached(tiny: tuple[Path, PreTrainedModel]) -> None:
    folder, reference = tiny
    plain = driver(folder)
    alone = plain.add(PROMPT, slot=0, logprobs=ASKED)
    plain.run([alone], num_outputs=NUM_OUTPUTS)
    assert alone.outputs == greedy_text(reference, PROMPT, NUM_OUTPUTS)
    assert len(bits(alone)) == len(PROMPT) - 1 + NUM_OUTPUTS

    behind = plain.add(PROMPT, slot=3, logprobs=LogprobParams(top=2, prompt_start=len(PROMPT)))
    plain.share(behind, alone, 10)  # two whole pages and half of one
    plain.run([behind], num_outputs=NUM_OUTPUTS)
    assert bits(behind) == bits(alone)[-NUM_OUTPUTS:]

    scored = plain.add([*PROMPT, *alone.outputs], slot=4, logprobs=ASKED)
    plain.run([scored], num_outputs=1)
    assert bits(scored)[:-1] == bits(alone), "a decode has the bits of a prompt that repeats it"

    drafted = plain.add(PROMPT, slot=5, logprobs=ASKED)
    plain.run([drafted], num_outputs=1)
    plain.step([(drafted, 1)], {5: alone.outputs[1 : NUM_OUTPUTS - 1]})
    assert bits(drafted) == bits(alone)

    for prompts in (((0, 16),), ()):  # padded steps, and steps as they are
        busy = driver(folder, prompts=prompts)
        others = [busy.add(PROMPT[: 3 + number], slot=number) for number in (1, 5)]
        others.append(busy.add(PROMPT[4:], slot=2, sampling=SamplingParams(temperature=1.0, seed=3)))
        request = busy.add(PROMPT, slot=6, logprobs=ASKED)
        busy.run([*others, request], num_outputs=NUM_OUTPUTS, chunk=5)
        assert bits(request) == bits(alone)


def test_what_cannot_be_deterministic_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="fa3 does not go with --deterministic"):
        CudaDevice(place(), attention="fa3", is_deterministic=True)
