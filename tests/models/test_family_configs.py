"""Configs as published: names and shapes are those of transformers' classes, and sums those of the models' pages."""

import math
from typing import Any

import pytest

from headwater.models.config import parse_hf_config
from headwater.models.model_files import ModelFileError
from headwater.models.ranks.share import ModelShare, check_tp_size

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
    "microsoft/phi-4": (
        {
            "architectures": ["Phi3ForCausalLM"], "vocab_size": 100352, "hidden_size": 5120,
            "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10,
            "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "rope_theta": 250000,
            "rope_scaling": None, "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False,
        },
        14_659_507_200,
    ),
    "microsoft/Phi-4-mini-instruct": (
        {
            "architectures": ["Phi3ForCausalLM"], "vocab_size": 200064, "hidden_size": 3072,
            "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-5, "sliding_window": 262144, "tie_word_embeddings": True,
            "rope_scaling": {
                "type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1 + index for index in range(48)],
            },
        },
        3_836_021_760,
    ),
    "zai-org/GLM-4-9B-0414": (
        {
            "architectures": ["Glm4ForCausalLM"], "vocab_size": 151552, "hidden_size": 4096,
            "intermediate_size": 13696, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 2,
            "head_dim": 128, "max_position_embeddings": 32768, "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5, "attention_bias": True, "tie_word_embeddings": False,
        },
        9_400_279_040,
    ),
    "allenai/OLMo-2-1124-7B": (
        {
            "architectures": ["Olmo2ForCausalLM"], "vocab_size": 100352, "hidden_size": 4096,
            "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
            "max_position_embeddings": 4096, "rope_theta": 500000, "rms_norm_eps": 1e-6, "attention_bias": False,
            "tie_word_embeddings": False,
        },
        7_298_617_344,
    ),
    "allenai/Olmo-3-1025-7B": (
        {
            "architectures": ["Olmo3ForCausalLM"], "vocab_size": 100278, "hidden_size": 4096,
            "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
            "max_position_embeddings": 65536, "rope_theta": 500000, "rms_norm_eps": 1e-6, "attention_bias": False,
            "tie_word_embeddings": False, "sliding_window": 4096,
            "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
            "rope_scaling": {
                "attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
                "original_max_position_embeddings": 8192, "rope_type": "yarn",
            },
        },
        7_298_011_136,
    ),
    "google/gemma-3-1b-it": (
        {
            "architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144, "hidden_size": 1152,
            "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 256, "max_position_embeddings": 32768, "rope_theta": 1000000, "rope_local_base_freq": 10000,
            "rope_scaling": None, "rms_norm_eps": 1e-6, "sliding_window": 512, "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
            "attn_logit_softcapping": None, "final_logit_softcapping": None,
        },
        999_885_952,
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


def test_windows_and_the_two_rotary_embeddings() -> None:
    gemma = parse_hf_config(PUBLISHED["google/gemma-3-1b-it"][0], {})
    assert gemma.window == 512 and [gemma.window_of(layer) for layer in (4, 5)] == [512, None]
    assert gemma.local_layers == tuple(layer for layer in range(26) if layer % 6 != 5)
    assert (gemma.rope_of(4).theta, gemma.rope_of(5).theta) == (1e4, 1e6)
    assert (gemma.activation, gemma.norm_offset, gemma.score_scale) == ("gelu_tanh", 1.0, 1 / 16)
    assert gemma.embedding_scale == math.sqrt(1152) and gemma.tie_word_embeddings
    larger = {**PUBLISHED["google/gemma-3-1b-it"][0], "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    scaled = parse_hf_config(larger, {})  # as in the larger models: of layers without a window alone
    assert (scaled.rope_of(4).kind, scaled.rope_of(5).kind) == ("default", "linear")
    olmo = parse_hf_config(PUBLISHED["allenai/Olmo-3-1025-7B"][0], {})
    assert (olmo.rope_of(2).kind, olmo.rope_of(3).kind) == ("default", "yarn") and olmo.window_of(3) is None
    assert olmo.rope_of(3).attention_factor == 1.2079441541679836 and olmo.rope_of(2).theta == 5e5
    by_type = {**PUBLISHED["google/gemma-3-1b-it"][0], "rope_theta": None, "rope_local_base_freq": None}
    by_type["rope_parameters"] = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert parse_hf_config(by_type, {}) == gemma


def test_rotary_embeddings_of_a_part_of_the_head() -> None:
    phi = parse_hf_config(PUBLISHED["microsoft/Phi-4-mini-instruct"][0], {})
    assert phi.rotary_pairs == 48 and phi.window is None
    frequencies = phi.rope.inv_freq(128)
    assert (frequencies[48:] == 0).all() and frequencies[1] == pytest.approx(10000 ** (-1 / 48) / 2, rel=1e-6)
    assert phi.rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    short = {**PUBLISHED["microsoft/Phi-4-mini-instruct"][0], "max_position_embeddings": 4096}
    assert parse_hf_config(short, {}).rope.freq_factors == (1.0,) * 48
    wrong = {**short, "rope_scaling": {"type": "su", "short_factor": [1.0] * 47, "long_factor": [1.0] * 48}}
    with pytest.raises(ModelFileError, match="there are 47 rotary factors for 48 pairs"):
        parse_hf_config(wrong, {})
    glm = parse_hf_config(PUBLISHED["zai-org/GLM-4-9B-0414"][0], {})
    assert glm.rotary_pairs == 32 and glm.is_interleaved and glm.qkv_bias and not glm.o_bias


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("google/gemma-3-1b-it", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
        ("google/gemma-3-1b-it", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported, only"),
        ("google/gemma-3-1b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("ibm-granite/granite-3.3-8b-instruct", {"residual_multiplier": 0}, "residual_scale of the model must be"),
        ("HuggingFaceTB/SmolLM3-3B", {"no_rope_layers": [1, 2] * 18}, "no_rope_layers must be a list of 0 or 1"),
        ("microsoft/phi-4", {"partial_rotary_factor": 1.5}, "partial_rotary_factor must be above 0 and at most 1"),
    ],
)
def test_what_a_family_does_not_have_is_named(name: str, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        parse_hf_config({**PUBLISHED[name][0], **extra}, {})


@pytest.mark.parametrize("name", ["microsoft/phi-4", "allenai/OLMo-2-1124-7B", "zai-org/GLM-4-9B-0414"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ranks_take_all_rows_of_published_shapes(name: str, size: int) -> None:
    """Phi-4 has 10 KV heads: 4 and 8 ranks do not fit them."""
    config = parse_hf_config(PUBLISHED[name][0], {})
    if config.num_kv_heads % size and size % config.num_kv_heads:
        with pytest.raises(ValueError, match=f"--tp-size {size} does not"):
            check_tp_size(config, size)
        return
    check_tp_size(config, size)
    for parameter, shape in config.parameter_shapes().items():
        found = [ModelShare(rank, size).rows(parameter, config) for rank in range(size)]
        if found[0] is not None:
            assert {row for parts in found if parts for part in parts for row in part} == set(range(shape[0]))


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
