"""Steps that several ranks compute together: what rank 0 samples is what one process alone would have sampled."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from ranked_models import VOCAB_SIZE, own_kernels, ranked_runner, tiny_config, tiny_device, tiny_runner
from step_driver import DrivenRequest, StepDriver

from headwater.messages.generation import LogprobParams, SamplingParams
from headwater.models.config import ModelConfig

NUM_OUTPUTS = 12
PROMPTS = [np.random.default_rng(5).integers(0, VOCAB_SIZE, length).tolist() for length in (1, 3, 17, 40, 9)]
SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(temperature=1.2, top_k=20, top_p=0.9, seed=11),
    SamplingParams(temperature=0.0, logit_bias={7: 2.0}),
)


def _run(runner: object, samplings: Sequence[SamplingParams], *, wants_logprobs: bool = False) -> list[DrivenRequest]:
    driver = StepDriver(runner)  # type: ignore[arg-type]
    logprobs = LogprobParams(top=3, prompt_start=0) if wants_logprobs else None
    requests = [
        driver.add(prompt, slot=slot, sampling=sampling, logprobs=logprobs)
        for slot, (prompt, sampling) in enumerate(zip(PROMPTS, samplings, strict=True))
    ]
    driver.run(requests, num_outputs=NUM_OUTPUTS, chunk=11)
    return requests


def _texts(requests: Sequence[DrivenRequest]) -> list[list[int]]:
    return [request.outputs for request in requests]


CONFIGS = {
    "all-optional": tiny_config(),
    "tied": tiny_config(tie_word_embeddings=True, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False),
    "as-the-default-model": tiny_config(num_heads=9, num_kv_heads=3, hidden_size=72, intermediate_size=96),
}


@pytest.mark.parametrize("has_kernels", [True, False], ids=["kernels", "numpy"])
@pytest.mark.parametrize(
    ("name", "size"), [("all-optional", 2), ("all-optional", 4), ("tied", 2), ("as-the-default-model", 3)]
)
def test_greedy_text_does_not_depend_on_the_number_of_ranks(
    name: str, size: int, has_kernels: bool, tmp_path: Path
) -> None:
    """A head, a column or a token that no rank has, or two have, changes the text of some prompt."""
    config: ModelConfig = CONFIGS[name]
    alone = tiny_runner(tiny_device(library=own_kernels(tmp_path / "alone") if has_kernels else None), config)
    greedy = [SAMPLINGS[0]] * len(PROMPTS)
    expected = _texts(_run(alone, greedy))
    assert len({token for text in expected for token in text}) > 10, "degenerate text would prove nothing"
    with ranked_runner(size, config, tmp_path, has_kernels=has_kernels) as ranked:
        assert _texts(_run(ranked, greedy)) == expected
    assert ranked.errors == []
