"""The doctor's finding about the model: whether it is there, its bytes a token, and the expected speed."""

import json
from pathlib import Path

import pytest
from fake_pc import make_pc

from fake_machine import FakeMachine
from headwater.devices.cpu.machine_speed import MachineSpeed
from headwater.doctor.finding import Level
from headwater.doctor.model import ServedShape, model, served_shape
from headwater.launch.default_model import DEFAULT_MODEL, model_path
from headwater.models.loader import resolve_model

SPEED = MachineSpeed(num_threads=2, read_gb_s=20.0, gflop_s=200.0, int8_gop_s=400.0)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}


@pytest.fixture
def pc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    return make_pc(tmp_path, monkeypatch)


def write_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_every_matrix_once_and_no_whole_embedding(tmp_path: Path, tied: bool) -> None:
    """A model whose head is a matrix of its own reads one row of the embedding alone."""
    folder = write_folder(tmp_path / "m", tie_word_embeddings=tied)
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128
    num_weights = 2 * layer + 64 * 1000
    assert served_shape(resolve_model(str(folder))) == ServedShape(2, num_weights, token_bytes=2 * num_weights)


def test_of_experts_only_those_count_that_a_token_goes_through(tmp_path: Path) -> None:
    """Else a model of 30 billion weights would look ten times slower than it is."""
    experts = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 1}
    folder = write_folder(tmp_path / "m", tie_word_embeddings=True, **experts)
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128 + 4 * 64
    assert served_shape(resolve_model(str(folder))).num_weights == 2 * layer + 64 * 1000


def test_the_speed_is_that_of_the_memory_and_never_above(tmp_path: Path) -> None:
    large, small = ServedShape(32, 8 * 10**9, 5 * 10**9), ServedShape(30, 135 * 10**6, 96 * 10**6)
    assert large.has_blocks
    assert 0.6 < large.tokens_per_s(SPEED) / (20e9 / 5e9) < 1
    assert small.tokens_per_s(SPEED) < 0.8 * 20e9 / 96e6, "each layer and each token cost some time beside the reads"
    wide = ServedShape(32, 8 * 10**9, 16 * 10**9)
    assert not wide.has_blocks
    assert 0.8 < wide.tokens_per_s(SPEED) / (20e9 / 16e9) < 1


def test_the_default_model_on_two_avx2_cores() -> None:
    """134 tokens/s were measured through HTTP at these rates (29 November 2026)."""
    measured = MachineSpeed(num_threads=2, read_gb_s=27.0, gflop_s=200.0, int8_gop_s=660.0)
    shape = ServedShape(30, 134_480_000, token_bytes=96_436_224)
    assert shape.tokens_per_s(measured) == pytest.approx(134, rel=0.2)


def test_a_model_of_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    found = model(str(folder), SPEED)
    assert found.level is Level.OK
    assert "MB of weights a token: about" in found.text
    assert found.facts["expected_tokens_per_s"] > 0
    assert "expected_tokens_per_s" not in model(str(folder), None).facts, "nothing was measured"


def test_the_default_model_that_is_not_here_yet(pc: FakeMachine) -> None:
    found = model(None, SPEED)
    assert found.level is Level.NOTE
    assert "fetches 93 MB" in found.text
    assert f"headwater models pull {DEFAULT_MODEL.name}" in found.remedy


def test_a_hub_id_is_not_fetched(pc: FakeMachine) -> None:
    found = model("someone/some-model", SPEED)
    assert (found.level, found.facts["cached"]) == (Level.NOTE, False)


def test_a_damaged_model_is_a_problem(pc: FakeMachine) -> None:
    path = model_path(DEFAULT_MODEL)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(DEFAULT_MODEL.file_bytes)
    found = model(None, SPEED)
    assert found.level is Level.PROBLEM
    assert str(path) in found.text


@pytest.mark.slow
def test_blocks_of_a_file_count_as_they_are(tmp_path: Path) -> None:
    """Q4_0 has kernels; Q5_1 has none and becomes 16 bits."""
    import torch

    from headwater.models.config import read_hf_config
    from tiny_gguf import write_gguf_model

    config = read_hf_config(write_folder(tmp_path / "m", tie_word_embeddings=True))
    parameters = {name: torch.zeros(shape) for name, shape in config.parameter_shapes().items()}
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128
    for form, bits in (("Q4_0", 4.5), ("Q5_1", 16)):
        path = write_gguf_model(tmp_path / f"{form}.gguf", config, "llama", parameters, block_format=form)
        assert served_shape(resolve_model(str(path))).token_bytes == (2 * layer + 64 * 1000) * bits / 8
    experts = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 1}
    config = read_hf_config(write_folder(tmp_path / "e", tie_word_embeddings=True, **experts))
    parameters = {name: torch.zeros(shape) for name, shape in config.parameter_shapes().items()}
    path = write_gguf_model(tmp_path / "experts.gguf", config, "llama", parameters, block_format="Q4_0")
    routers = 2 * 4 * 64 * 16 / 8  # not in blocks
    assert served_shape(resolve_model(str(path))).token_bytes == (2 * layer + 64 * 1000) * 4.5 / 8 + routers
