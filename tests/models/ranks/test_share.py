"""What each rank holds of a model: together all of it, nothing twice but KV heads where there are too few."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.ranks.group import CpuRanks
from headwater.devices.cpu.ranks.segment import RankSegment
from headwater.devices.host_tensor import HostTensor, RandomTensor
from headwater.devices.quantise import quantise
from headwater.devices.scaled_tensor import Codes, ScaledTensor
from headwater.models.config import ModelConfig
from headwater.models.experts.config import MIXTRAL_EXPERTS, ExpertsConfig
from headwater.models.loader import LoadedModel, load_model, read_config, resolve_model
from headwater.models.ranks.share import ModelShare, check_tp_size, join
from headwater.models.rope import RopeConfig

EXPERTS = ExpertsConfig(
    num_experts=3, per_token=2, intermediate_size=48, renormalises=True, names=MIXTRAL_EXPERTS.names, dense_layers=(1,)
)


def _config(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "vocab_size": 211, "hidden_size": 32, "intermediate_size": 112, "num_heads": 4, "num_kv_heads": 2,
        "num_layers": 1, "qkv_bias": False, "mlp_bias": False, "qk_norm": False,
    }  # fmt: skip
    return ModelConfig(
        architecture="LlamaForCausalLM", head_dim=8, rope=RopeConfig(theta=500.0), norm_eps=1e-5,
        tie_word_embeddings=True, o_bias=True, max_context=64, **(base | changes),
    )  # fmt: skip


@given(
    group=st.integers(1, 6),
    kv_heads=st.integers(1, 6),
    size=st.integers(1, 12),
    inner=st.integers(12, 5000),
    vocab=st.integers(12, 5000),
)
def test_the_ranks_have_everything_once(group: int, kv_heads: int, size: int, inner: int, vocab: int) -> None:
    config = _config(num_heads=group * kv_heads, num_kv_heads=kv_heads, intermediate_size=inner, vocab_size=vocab)
    try:
        check_tp_size(config, size)
    except ValueError:
        assume(False)
    shares = [ModelShare(rank, size) for rank in range(size)]
    for parts, total in (
        ([share.heads(config) for share in shares], config.num_heads),
        ([share.mlp_columns(config) for share in shares], inner),
        ([share.tokens(config) for share in shares], vocab),
    ):
        assert [item for part in parts for item in part] == list(range(total))
        assert all(parts), "a rank without anything has empty weights"
    for share in shares:
        heads, of_kv = share.heads(config), share.kv_heads(config)
        assert len(heads) % len(of_kv) == 0
        for index, head in enumerate(heads):  # as the attention of a rank pairs them
            assert of_kv[index // (len(heads) // len(of_kv))] == head // group


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (_config(), 3, "--tp-size 3 does not divide the model's 4 query heads: take one of 1, 2, 4"),
        (_config(num_heads=12, num_kv_heads=4), 6, "--tp-size 6 does not fit the model's 4 KV heads"),
        (_config(), 0, "--tp-size must be at least 1, found 0"),
        (_config(intermediate_size=3), 4, "--tp-size 4 is more than the model's 3 MLP columns"),
        (_config(experts=replace(EXPERTS, intermediate_size=3)), 4, "--tp-size 4 is more than the model's 3 MLP col"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(config: ModelConfig, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_tp_size(config, size)


def test_a_block_is_never_cut() -> None:
    """Its numbers share a scale: half a block cannot be read."""
    config = _config(num_heads=6, num_kv_heads=6)
    weight = quantise(HostTensor.of(np.ones((4, 64), dtype=np.float32)), "Q8_0")
    name = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(ValueError, match=rf"--tp-size 3 does not fit tensor '{name}': its Q8_0 blocks of 32 inputs"):
        ModelShare(0, 3).cut(name, weight, config)


def test_columns_of_a_quantised_matrix_are_its_blocks() -> None:
    values = np.random.default_rng(2).standard_normal((5, 96)).astype(np.float32)
    weight = quantise(HostTensor.of(values), "Q4_0")
    np.testing.assert_array_equal(weight.columns(32, 96).to_float32(), weight.to_float32()[:, 32:96])


@pytest.mark.parametrize("format", ["int4", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("tile", [(1, 32), (24, 64), (112, 64), (64, 64)])
@pytest.mark.parametrize("has_offsets", [False, True])
def test_codes_of_a_fused_matrix_keep_their_scales(format: Codes, tile: tuple[int, int], has_offsets: bool) -> None:
    """Tiles of outputs that go across the borders of the matrices and of the ranks' parts."""
    random = np.random.default_rng(7)
    config = _config(fused=("gate_up_proj",), intermediate_size=112)
    shape, per_row, dtype = (224, 64), 32 if format == "int4" else 64, np.int8 if format == "int8" else np.uint8
    num_tiles = tuple(-(-size // part) for size, part in zip(shape, tile, strict=True))
    weight = ScaledTensor(
        format, shape,
        codes=random.integers(0, 100, (224, per_row)).astype(dtype),
        scales=random.random(num_tiles, dtype=np.float32),
        offsets=random.random(num_tiles, dtype=np.float32) if has_offsets else None,
        tile=tile,
    )  # fmt: skip
    name = "model.layers.0.mlp.gate_up_proj.weight"
    cuts = [ModelShare(rank, 4).cut(name, weight, config) for rank in range(4)]
    parts = [cut.to_float32() for cut in cuts if isinstance(cut, ScaledTensor)]
    np.testing.assert_array_equal(join(name, parts, config), weight.to_float32())


def test_random_numbers_of_a_fused_matrix_are_those_of_the_whole() -> None:
    config = _config(fused=("qkv_proj",))
    whole = RandomTensor((64, 32), seed=3, scale=0.5)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    cuts = [ModelShare(rank, 2).cut(name, whole, config) for rank in range(2)]
    parts = [cut.to_host().to_float32() for cut in cuts if isinstance(cut, RandomTensor)]
    assert [cut.shape for cut in cuts] == [(32, 32), (32, 32)]
    np.testing.assert_array_equal(join(name, parts, config), whole.to_host().to_float32())


def test_a_bias_behind_a_sum_is_added_once() -> None:
    bias = HostTensor.of(np.arange(1, 5, dtype=np.float32))
    parts = [ModelShare(rank, 2).cut("model.layers.0.self_attn.o_proj.bias", bias, _config()) for rank in range(2)]
    total = sum(part.to_float32() for part in parts if isinstance(part, HostTensor))
    np.testing.assert_array_equal(total, bias.to_float32())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 4 query heads, as files."""
    folder = tmp_path_factory.mktemp("model")
    raw = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    random = np.random.default_rng(4)
    shapes = read_config(resolve_model(str(folder))).parameter_shapes()
    tensors = {name: random.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def _load(folder: Path, rank: int, size: int) -> LoadedModel:
    segment = RankSegment.create(size=size, buffer_bytes=1, num_slots=1)
    device = CpuDevice(num_threads=1, use_kernels=False, ranks=CpuRanks(segment, rank=rank))
    segment.close()
    return load_model(resolve_model(str(folder)), device=device, dtype="float32")


def test_a_rank_loads_its_share_under_the_identity_of_the_whole(folder: Path) -> None:
    """Namespaces and stores know the weights by this identity, whatever the number of ranks."""
    whole = load_model(resolve_model(str(folder)), device=CpuDevice(use_kernels=False), dtype="float32")
    first, second = (_load(folder, rank, 2) for rank in range(2))
    assert first.weights_id == second.weights_id == whole.weights_id
    assert whole.weights_bytes / 2 < first.weights_bytes < 0.51 * whole.weights_bytes  # norms are whole
    assert [list(each.kv_heads) for each in (whole, first, second)] == [[0, 1], [0], [1]]
    assert first.kv_layout(page_size=4).page_bytes * 2 == whole.kv_layout(page_size=4).page_bytes
    assert first.whole_kv_layout(page_size=4) == whole.kv_layout(page_size=4)
    for name, _ in whole.model.iter_named():
        parts = [each.model.get_by_name(name).to_float32() for each in (first, second)]
        expected = whole.model.get_by_name(name).to_float32()
        axis = 1 if "o_proj" in name or "down_proj" in name else 0
        found = parts[0] if "norm" in name else np.concatenate(parts, axis=axis)
        np.testing.assert_array_equal(found, expected)


def test_a_size_is_refused_before_weights_are_read(folder: Path) -> None:
    with pytest.raises(ValueError, match="--tp-size 3 does not divide"):
        _load(folder, 0, 3)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [3, 1000])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts": EXPERTS},
        {"fused": ("qkv_proj", "gate_up_proj"), "qkv_bias": True, "mlp_bias": True},
        {"qk_norm": True, "qk_norm_whole": True, "has_sinks": True},
    ],
)
def test_parameters_are_put_together_from_the_parts_of_ranks(size: int, num_rows: int, changes: dict[str, Any]) -> None:
    """Four ranks of two KV heads: two of them hold the same head. Only first rows are asked for, so parts are short."""
    config = _config(num_layers=2, **changes)
    for name, shape in config.parameter_shapes().items():
        whole = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        cuts = [ModelShare(rank, size).cut(name, HostTensor.of(whole), config) for rank in range(size)]
        parts = [cut.to_float32()[:num_rows] for cut in cuts if isinstance(cut, HostTensor)]
        assert np.array_equal(join(name, parts, config)[:num_rows], whole[:num_rows]), name
        if size > 1 and any(part in name for part in (".experts.", "_proj.weight", "_norm.weight", "sinks")):
            assert all(cut.shape != whole.shape for cut in cuts), "it is cut, not whole on every rank"
