"""Steps that several ranks compute together: what rank 0 samples is what one process alone would have sampled."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from ranked_models import VOCAB_SIZE, RankedRunner, own_kernels, ranked_runner, tiny_config, tiny_device, tiny_runner
from step_driver import DrivenRequest, StepDriver

from headwater.devices.rank_group import RankFailed
from headwater.execution.cpu_runner import CpuRunner
from headwater.messages.generation import LogprobParams, SamplingParams
from headwater.models.config import ModelConfig
from headwater.models.experts.config import GPT_OSS_EXPERTS, QWEN3_EXPERTS, ExpertsConfig
from headwater.models.families.norms import GEMMA_NORMS, GLM4_NORMS, OLMO2_NORMS
from headwater.models.rope import RopeConfig
from headwater.models.weights import WeightForm

NUM_OUTPUTS = 8
PROMPTS = [np.random.default_rng(5).integers(0, VOCAB_SIZE, length).tolist() for length in (1, 3, 17, 40, 9)]
SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=3),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5),
    SamplingParams(temperature=1.2, top_k=20, top_p=0.9, seed=11),
    SamplingParams(temperature=0.0, logit_bias={7: 2.0}),
)


def _run(runner: Any, samplings: Sequence[SamplingParams], *, wants_logprobs: bool = False) -> list[DrivenRequest]:
    driver = StepDriver(runner)
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
    "as-gemma": tiny_config(
        norms=GEMMA_NORMS,
        norm_offset=0.5,
        activation="gelu_tanh",
        window=9,
        local_layers=(0,),
        local_rope=RopeConfig(theta=50.0),
        score_scale=0.3,
        embedding_scale=3.0,
        logits_divisor=2.0,
    ),
    "experts": tiny_config(
        mlp_bias=False, experts=ExpertsConfig(5, 2, 48, True, QWEN3_EXPERTS.names, dense_layers=(0,)), num_layers=3
    ),
    "norms-of-all-heads": tiny_config(qk_norm_whole=True, norms=OLMO2_NORMS, embedding_scale=3.0),
    "fused": tiny_config(
        fused=("qkv_proj", "gate_up_proj"),
        mlp_bias=False,
        norms=GLM4_NORMS,
        is_interleaved=True,
        rope=RopeConfig(theta=500.0, partial=0.5),
    ),
    "as-gpt-oss": tiny_config(
        has_sinks=True,
        qk_norm=False,
        window=9,
        local_layers=(0,),
        mlp_bias=False,
        experts=ExpertsConfig(
            5, 2, 48, True, GPT_OSS_EXPERTS.names, has_bias=True, activation="clamped_swiglu", is_stacked=True
        ),
    ),
}


@pytest.mark.parametrize(
    ("name", "size", "has_kernels"),
    [
        ("all-optional", 2, True),
        ("all-optional", 4, True),
        ("tied", 2, True),
        ("experts", 2, True),
        ("as-gemma", 2, True),
        ("norms-of-all-heads", 2, True),
        ("norms-of-all-heads", 4, True),  # two ranks hold the same keys, and one of them counts their squares
        ("norms-of-all-heads", 4, False),
        ("fused", 2, True),
        ("fused", 4, True),
        ("as-gpt-oss", 2, True),
        ("as-gpt-oss", 4, False),
        ("as-the-default-model", 3, True),
        ("as-the-default-model", 3, False),  # shares do not depend on what computes
    ],
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


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0"])
def test_quantised_weights_are_cut_between_their_blocks(form: str, tmp_path: Path) -> None:
    """A rank has the blocks of the whole matrix, so its values are the same. Sums alone are in another order."""
    config = tiny_config(hidden_size=64, intermediate_size=192, head_dim=32)
    blocks = WeightForm("float32", frozenset({form}), quantised=form)
    library = own_kernels(tmp_path / "alone")
    if library is None:
        pytest.skip("no C compiler")
    greedy = [SAMPLINGS[0]] * len(PROMPTS)
    expected = _texts(_run(tiny_runner(tiny_device(library=library), config, form=blocks), greedy))
    with ranked_runner(2, config, tmp_path, has_kernels=True, form=blocks) as ranked:
        assert {it.format for it in ranked.runners[1].packed_weights} == {form}
        assert _texts(_run(ranked, greedy)) == expected


@pytest.fixture
def has_kernels() -> bool:
    return True


@pytest.fixture
def both(has_kernels: bool, tmp_path: Path) -> Iterator[tuple[CpuRunner, RankedRunner]]:
    """The same model in one process and on two ranks."""
    alone = tiny_device(library=own_kernels(tmp_path / "alone") if has_kernels else None)
    with ranked_runner(2, CONFIGS["tied"], tmp_path, has_kernels=has_kernels) as ranked:
        yield tiny_runner(alone, CONFIGS["tied"]), ranked
    assert ranked.errors == []


@pytest.mark.parametrize("has_kernels", [True, False], ids=["kernels", "numpy"])
def test_every_way_of_sampling_chooses_the_same_tokens(both: tuple[CpuRunner, RankedRunner]) -> None:
    """Rank 0 has the logits of all ranks, and the others learn what it has drawn."""
    expected, found = (_run(runner, SAMPLINGS, wants_logprobs=True) for runner in both)
    assert _texts(found) == _texts(expected)
    for one, other in zip(found, expected, strict=True):
        assert [it.top_ids for it in one.prompt_logprobs] == [it.top_ids for it in other.prompt_logprobs]
        for here, there in zip(one.logprobs, other.logprobs, strict=True):
            assert here.top_ids == there.top_ids
            np.testing.assert_allclose(here.top_logprobs, there.top_logprobs, atol=1e-4)


def test_long_prompts_are_scored_in_several_blocks(both: tuple[CpuRunner, RankedRunner]) -> None:
    """The next block's logits must not overwrite the block that rank 0 still reads."""
    prompt = np.random.default_rng(8).integers(0, VOCAB_SIZE, 150).tolist()
    answers = []
    for runner in both:
        driver = StepDriver(cast("CpuRunner", runner))
        request = driver.add(prompt, slot=2, logprobs=LogprobParams(top=2, prompt_start=0))
        driver.step([(request, len(prompt))])
        answers.append(request.prompt_logprobs)
    assert [it.top_ids for it in answers[1]] == [it.top_ids for it in answers[0]]
    assert len(answers[1]) == len(prompt) - 1


def test_masks_and_embeddings_are_rank_0s_alone(both: tuple[CpuRunner, RankedRunner]) -> None:
    texts, sums = [], []
    for runner in both:
        driver = StepDriver(cast("CpuRunner", runner))
        masked, free = (driver.add(PROMPTS[2], slot=slot) for slot in (0, 1))
        pooled = driver.add(PROMPTS[3], slot=2, pooling="mean")
        masked.mask = lambda num_outputs: (np.arange(7) == num_outputs % 7).astype(np.uint32) * 0x7FFF  # 15 tokens
        driver.run([masked, free, pooled], num_outputs=6, chunk=30)
        texts.append((masked.outputs, free.outputs, pooled.outputs))
        sums.append(np.sum(pooled.pooled, axis=0))
    assert texts[1] == texts[0]
    np.testing.assert_allclose(sums[1], sums[0], rtol=1e-4, atol=1e-4)


def test_greedy_steps_do_not_gather_all_logits(both: tuple[CpuRunner, RankedRunner]) -> None:
    """64 rows of a vocabulary of 150,000 would be 38 MB a step."""
    _, ranked = both
    gathered = ranked.runners[0]._model_in_place._gathered
    assert gathered is not None
    driver = StepDriver(cast("CpuRunner", ranked))
    greedy, drawn = (driver.add(PROMPTS[2], slot=slot, sampling=SAMPLINGS[slot]) for slot in (0, 1))
    for requests, is_whole in (([greedy], False), ([greedy, drawn], True), ([greedy], False)):
        driver.run(requests, num_outputs=len(greedy.outputs) + 3)
        assert gathered.is_whole == is_whole


def test_a_row_that_is_not_finite_on_one_rank_fails(both: tuple[CpuRunner, RankedRunner]) -> None:
    _, ranked = both
    driver = StepDriver(cast("CpuRunner", ranked))
    bad, good = (driver.add(PROMPTS[3], slot=slot) for slot in (0, 1))
    driver.step([(bad, 39), (good, 39)])
    ranked.runners[1].kv.memory[bad.pages[0]] = 0xFF  # NaN in the heads of rank 1
    result = driver.step([(bad, 1), (good, 1)])
    assert result.is_finite.tolist() == [False, True]


def test_a_rank_that_computes_no_more_ends_the_step_of_all(tmp_path: Path) -> None:
    """Ranks 0 and 1 wait in a sum for rank 2, which does not come."""
    with ranked_runner(3, CONFIGS["as-the-default-model"], tmp_path, has_kernels=True) as ranked:
        driver = StepDriver(cast("CpuRunner", ranked))
        request = driver.add(PROMPTS[2], slot=0)
        driver.run([request], num_outputs=2)
        ranked.wait_idle()
        ranked.groups[0].limit_s = 0.5
        ranked.runners[2].replace_model(None)  # an error of its own before the first sum
        with pytest.raises(RankFailed, match="rank 2 did not answer"):
            driver.run([request], num_outputs=4)
    assert sorted(type(error).__name__ for error in ranked.errors) == ["AssertionError", "RankFailed"]
