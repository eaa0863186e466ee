"""gpt-oss: its configs as published, and what of them is refused by name."""

import math
from typing import Any

import pytest
from mxfp4_files import GPT_OSS_20B, GPT_OSS_120B

from headwater.models.config import ModelConfig, parse_hf_config
from headwater.models.model_files import ModelFileError
from headwater.models.ranks.share import ModelShare, check_tp_size


@pytest.mark.parametrize(
    ("raw", "num_parameters", "num_active"),
    [(GPT_OSS_20B, 20.91e9, 3.61e9), (GPT_OSS_120B, 116.83e9, 5.13e9)],  # arXiv 2508.10925, table 1
)
def test_sizes_are_those_that_were_published(raw: dict[str, Any], num_parameters: float, num_active: float) -> None:
    config = parse_hf_config(raw, {})
    found = sum(math.prod(shape) for shape in config.parameter_shapes().values())
    assert math.isclose(found, num_parameters, rel_tol=3e-4)
    embedding = config.vocab_size * config.hidden_size  # is not counted among the active ones
    assert math.isclose(found * config.active_share - embedding, num_active, rel_tol=3e-3)


def test_the_config_is_read() -> None:
    config = parse_hf_config(GPT_OSS_20B, {})
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (64, 8, 64)
    assert config.qkv_bias and config.o_bias and config.has_sinks and not config.tie_word_embeddings
    assert [config.window_of(layer) for layer in range(4)] == [128, None, 128, None]
    assert config.max_context == 131072 and config.rope.theta == 150000 and not config.rope.truncate
    assert math.isclose(config.rope.attention_factor, 0.1 * math.log(32) + 1)
    experts = config.experts
    assert experts is not None and (experts.num_experts, experts.per_token) == (32, 4)
    assert experts.renormalises and experts.has_bias and experts.activation == "clamped_swiglu"
    shapes = config.parameter_shapes()
    assert shapes["model.layers.23.mlp.experts.31.gate_proj.weight"] == (2880, 2880)
    assert shapes["model.layers.23.mlp.experts.31.down_proj.bias"] == (2880,)
    assert shapes["model.layers.0.mlp.router.bias"] == (32,) and shapes["model.layers.0.self_attn.sinks"] == (64,)


def _changed(**changes: Any) -> ModelConfig:
    return parse_hf_config(GPT_OSS_20B | changes, {})


def test_layers_without_a_list_of_types_take_turns() -> None:
    assert _changed(layer_types=None).local_layers == tuple(range(0, 24, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu_limit": 5.0}, r"swiglu_limit 5\.0 is not supported, only 7\.0"),
        ({"swiglu_alpha": 1.5}, r"swiglu_alpha 1\.5 is not supported, only 1\.702"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_scaling": None}, "lacks rope_scaling"),
        ({"layer_types": ["chunked_attention"] * 24}, "layer_types holds 'chunked_attention'"),
        ({"num_experts_per_tok": 33}, "num_experts_per_tok must be an integer from 1 to 32"),
        (
            {"quantization_config": {"quant_method": "mxfp4", "group": 16}},
            r"quantization_config\.group 16 is not known",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8' is not supported of GptOssForCausalLM"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "quant_method 'mxfp4' is not supported of Qwen3ForCausalLM"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        _changed(**changes)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_cut_the_published_experts_between_blocks_of_32(size: int) -> None:
    config = parse_hf_config(GPT_OSS_20B, {})
    check_tp_size(config, size)
    shares = [ModelShare(rank, size).mlp_columns(config, of_expert=True) for rank in range(size)]
    assert [column for share in shares for column in share] == list(range(2880))
    assert all(share.start % 32 == 0 for share in shares)
    assert max(map(len, shares)) <= 1.1 * 2880 / size
