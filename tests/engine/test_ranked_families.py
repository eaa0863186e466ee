"""Families whose parameters ranks cut in ways of their own, from folders as published: several ranks write one's text.

QK-norms of all heads (OLMo), fused matrices (Phi, GLM-4), sinks and experts with biases, plain and in MXFP4 (gpt-oss).
"""

import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("torch")

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("execution", "models/experts")]
from mxfp4_files import TINY, draw_tensors, write_folder  # noqa: E402
from ranked_models import load_tiny, own_kernels, ranked_runner, runner_of, tiny_device  # noqa: E402
from step_driver import StepDriver  # noqa: E402

from headwater.devices.cpu.device import CpuDevice  # noqa: E402
from headwater.models.loader import LoadedModel, open_weights, read_config, resolve_model  # noqa: E402
from headwater.models.ranks.share import join  # noqa: E402
from headwater.models.weights import WeightForm  # noqa: E402
from tiny_models import VOCAB_SIZE, make_tiny_model  # noqa: E402

PROMPTS = [np.random.default_rng(9).integers(3, VOCAB_SIZE, length).tolist() for length in (1, 13, 40)]
NUM_OUTPUTS = 16


def _texts(runner: object) -> list[list[int]]:
    driver = StepDriver(runner)  # type: ignore[arg-type]
    requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate(PROMPTS)]
    driver.run(requests, num_outputs=NUM_OUTPUTS, chunk=11)
    return [request.outputs for request in requests]


def _check(folder: Path, copies: Path, *, size: int, kept: frozenset[str] = frozenset()) -> None:
    """In float32, but for blocks of the `kept` formats."""
    files = resolve_model(str(folder))
    config, form = read_config(files), WeightForm("float32", kept)

    def load(device: CpuDevice) -> LoadedModel:
        source = open_weights(files, config, load_format="auto", seed=0)
        return load_tiny(device, config, form=form, source=source)

    device = tiny_device(library=own_kernels(copies / "alone"))
    alone = load(device)
    expected = _texts(runner_of(alone, device))
    assert len({token for text in expected for token in text}) > 8, "degenerate text would prove nothing"
    with ranked_runner(size, config, copies, has_kernels=True, load=load) as ranked:
        assert _texts(ranked) == expected
    assert ranked.errors == []
    models = [runner.model for runner in ranked.runners]
    for name, whole in alone.model.iter_named():
        parts = [model.get_by_name(name).to_float32() for model in models]
        np.testing.assert_array_equal(join(name, parts, config), whole.to_float32(), err_msg=name)


@pytest.mark.parametrize(
    ("name", "size"), [("olmo2", 2), ("olmo2", 4), ("olmo3", 2), ("phi3", 2), ("phi3", 4), ("glm4", 2), ("gpt-oss", 4)]
)
def test_ranks_give_the_text_of_one(name: str, size: int, tmp_path: Path) -> None:
    """Rows of a fused matrix from the wrong place, a bias added twice, a norm of a part of the heads."""
    make_tiny_model(name, tmp_path / "model")
    _check(tmp_path / "model", tmp_path, size=size)


def _mxfp4_folder(folder: Path, intermediate_size: int) -> Path:
    config = TINY | {"intermediate_size": intermediate_size, "num_hidden_layers": 2}
    return write_folder(folder, draw_tensors(config, seed=3), config)


@pytest.mark.parametrize("size", [2, 4])
def test_experts_in_mxfp4_are_cut_between_their_blocks(size: int, tmp_path: Path) -> None:
    _check(_mxfp4_folder(tmp_path / "model", 128), tmp_path, size=size, kept=frozenset({"MXFP4"}))


def test_blocks_that_cannot_be_cut_are_refused_by_name(tmp_path: Path) -> None:
    """Three blocks of 32 for two ranks."""
    reason = "--tp-size 2 does not fit tensor 'model.layers.0.mlp.experts.0.down_proj.weight': its MXFP4 blocks of 32"
    with pytest.raises(ValueError, match=reason):
        _check(_mxfp4_folder(tmp_path / "model", 96), tmp_path, size=2, kept=frozenset({"MXFP4"}))
