"""Models with experts: their configs as published, names and shapes of their checkpoints, what is refused."""

import math
from typing import Any

import pytest

from headwater.models.config import ModelConfig, parse_hf_config
from headwater.models.model_files import ModelFileError

# what the families here read of the config.json of Qwen/Qwen3-30B-A3B and mistralai/Mixtral-8x7B-v0.1
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "decoder_sparse_step": 1, "eos_token_id": 151645,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "vocab_size": 32000,
}  # fmt: skip
TINY = QWEN3_30B_A3B | {
    "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 64, "eos_token_id": 2,
}  # fmt: skip


def num_parameters(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in config.parameter_shapes().values())


def test_qwen3_30b_a3b_has_the_tensors_of_its_checkpoint() -> None:
    config = parse_hf_config(QWEN3_30B_A3B, {})
    shapes = config.parameter_shapes()
    assert len(shapes) == 18867 and num_parameters(config) == 30_532_122_624
    assert shapes["model.layers.0.mlp.gate.weight"] == (128, 2048)
    assert shapes["model.layers.47.mlp.experts.127.gate_proj.weight"] == (768, 2048)
    assert shapes["model.layers.47.mlp.experts.127.up_proj.weight"] == (768, 2048)
    assert shapes["model.layers.47.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert shapes["model.layers.5.self_attn.q_norm.weight"] == (128,)
    assert not any(".mlp.gate_proj" in name for name in shapes)
    assert config.experts is not None and (config.experts.per_token, config.experts.renormalises) == (8, True)
    assert 3.3e9 < num_parameters(config) * config.active_share < 3.4e9, "A3B: 3.3 billion are active"


def test_mixtral_8x7b_has_the_tensors_of_its_checkpoint() -> None:
    config = parse_hf_config(MIXTRAL_8X7B, {})
    shapes = config.parameter_shapes()
    assert len(shapes) == 995 and num_parameters(config) == 46_702_792_704
    assert shapes["model.layers.31.block_sparse_moe.gate.weight"] == (8, 4096)
    assert shapes["model.layers.31.block_sparse_moe.experts.7.w1.weight"] == (14336, 4096)
    assert shapes["model.layers.31.block_sparse_moe.experts.7.w2.weight"] == (4096, 14336)
    assert shapes["model.layers.31.block_sparse_moe.experts.7.w3.weight"] == (14336, 4096)
    assert config.experts is not None and config.experts.renormalises
    assert config.experts.place_of("model.layers.31.block_sparse_moe.experts.7.w2.weight") == (7, 2)
    assert config.experts.place_of("model.layers.31.block_sparse_moe.gate.weight") is None


@pytest.mark.parametrize(
    ("extra", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": [0, 2]}, (0, 2)),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (0, 1, 2)),
    ],
)
def test_layers_that_are_dense(extra: dict[str, Any], dense: tuple[int, ...]) -> None:
    config = parse_hf_config(TINY | extra, {})
    assert config.experts is not None and config.experts.dense_layers == dense
    shapes = config.parameter_shapes()
    assert [f"model.layers.{index}.mlp.down_proj.weight" in shapes for index in range(4)] == [
        index in dense for index in range(4)
    ]


@pytest.mark.parametrize("extra", [{"num_experts": 0}, {"mlp_only_layers": [0, 1, 2, 3]}, {"decoder_sparse_step": 5}])
def test_a_model_without_a_layer_of_experts_is_dense(extra: dict[str, Any]) -> None:
    assert parse_hf_config(TINY | extra, {}).experts is None


def test_transformers_own_spelling_of_the_number_of_experts() -> None:
    """It writes num_local_experts into a Qwen3-MoE that it saves."""
    raw = {key: value for key, value in TINY.items() if key != "num_experts"} | {"num_local_experts": 8}
    assert parse_hf_config(raw, {}) == parse_hf_config(TINY, {})


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be an integer from 1 to 8"),
        ({"num_experts": "many"}, "num_experts must be an integer"),
        ({"num_experts": None}, "lacks the integer 'num_local_experts'"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be an integer"),
        ({"mlp_only_layers": [0.5]}, "mlp_only_layers must be a list of integers"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer"),
    ],
)
def test_a_damaged_config_is_refused_by_name(extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFileError) as refused:
        parse_hf_config(TINY | extra, {})
    assert words in str(refused.value)


def test_a_dense_model_keeps_its_identity() -> None:
    """The repr is part of weights_id: stores keep their pages when the config gets a field that says nothing."""
    dense = parse_hf_config(TINY | {"architectures": ["Qwen3ForCausalLM"]}, {})
    assert repr(dense).endswith("qk_norm=True, max_context=40960, window=None)")
    assert "experts=ExpertsConfig(num_experts=8, per_token=2" in repr(parse_hf_config(TINY, {}))
