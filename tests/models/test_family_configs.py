"""Configs as published: names and shapes are those of transformers' classes, and sums those of the models' pages."""

import math
from typing import Any

import pytest

from headwater.models.config import parse_hf_config

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# the numbers of config.json as published, and how many parameters the model has
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "mistralai/Mistral-Small-24B-Instruct-2501": (
        {
            "architectures": ["MistralForCausalLM"], "vocab_size": 131072, "hidden_size": 5120,
            "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "max_position_embeddings": 32768, "rope_theta": 100000000.0, "rms_norm_eps": 1e-5,
            "sliding_window": None, "tie_word_embeddings": False,
        },
        23_572_403_200,
    ),
    "ibm-granite/granite-3.3-8b-instruct": (
        {
            "architectures": ["GraniteForCausalLM"], "vocab_size": 49159, "hidden_size": 4096,
            "intermediate_size": 12800, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "rope_theta": 10000000.0, "rms_norm_eps": 1e-5,
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22, "attention_multiplier": 0.0078125, "logits_scaling": 16.0,
        },
        8_170_864_640,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        {
            "architectures": ["SmolLM3ForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
            "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
            "max_position_embeddings": 65536, "rope_theta": 5000000.0, "rms_norm_eps": 1e-6,
            "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "use_sliding_window": False,
            "sliding_window": None, "attention_bias": False, "mlp_bias": False,
        },
        3_075_098_624,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    """A checkpoint with a tensor under another name does not load."""
    raw, num_parameters = PUBLISHED[name]
    config = parse_hf_config(raw, {})
    assert sum(map(math.prod, config.parameter_shapes().values())) == num_parameters
    (architecture,) = raw["architectures"]
    model_class = getattr(transformers, architecture)
    few = {key: value for key, value in raw.items() if key not in ("architectures", "layer_types", "no_rope_layers")}
    few |= {"num_hidden_layers": 2}
    with torch.device("meta"):
        model = model_class(model_class.config_class(**few))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parse_hf_config({**few, "architectures": [architecture]}, {}).parameter_shapes() == expected


def test_granites_multipliers_and_the_layers_without_positions() -> None:
    granite = parse_hf_config(PUBLISHED["ibm-granite/granite-3.3-8b-instruct"][0], {})
    assert (granite.embedding_scale, granite.residual_scale) == (12.0, 0.22)
    assert (granite.score_scale, granite.logits_divisor) == (0.0078125, 16.0)
    smollm3 = parse_hf_config(PUBLISHED["HuggingFaceTB/SmolLM3-3B"][0], {})
    assert smollm3.unrotated_layers == tuple(range(3, 36, 4)) and smollm3.tie_word_embeddings
    by_interval = {**PUBLISHED["HuggingFaceTB/SmolLM3-3B"][0], "no_rope_layers": None}
    assert parse_hf_config(by_interval, {}) == smollm3


def test_a_model_of_the_older_families_keeps_its_identity() -> None:
    """The pages of a store are found by it: fields that a newer version has must not change it."""
    mistral = parse_hf_config(PUBLISHED["mistralai/Mistral-Small-24B-Instruct-2501"][0], {})
    assert repr(mistral) == (
        "ModelConfig(architecture='MistralForCausalLM', vocab_size=131072, hidden_size=5120, intermediate_size=32768, "
        "num_layers=40, num_heads=32, num_kv_heads=8, head_dim=128, rope=RopeConfig(theta=100000000.0, kind='default', "
        "factor=1.0, original_context=0, low_freq_factor=1.0, high_freq_factor=4.0, beta_fast=32.0, beta_slow=1.0, "
        "truncate=True, attention_factor=1.0, freq_factors=()), norm_eps=1e-05, tie_word_embeddings=False, "
        "qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, max_context=32768, window=None)"
    )
    granite = parse_hf_config(PUBLISHED["ibm-granite/granite-3.3-8b-instruct"][0], {})
    assert repr(granite).endswith("logits_divisor=16.0)")
