"""config.json in the spellings of all versions, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from headwater.models.config import parse_hf_config, read_hf_config
from headwater.models.model_files import ModelFileError

pytestmark = pytest.mark.slow

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "eos_token_id": 2,
}


def test_a_plain_llama() -> None:
    config = parse_hf_config(LLAMA, {})
    assert (config.head_dim, config.q_size, config.kv_size) == (16, 64, 32)
    assert config.rope.theta == 500000.0
    assert config.rope.kind == "default"
    assert config.eos_token_ids == (2,)
    assert config.max_context == 2048
    assert not (config.tie_word_embeddings or config.qkv_bias or config.mlp_bias or config.qk_norm)


@pytest.mark.parametrize(
    ("extra", "kind", "factor", "context"),
    [
        ({"rope_scaling": None}, "default", 1.0, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "linear", 2.0, 2048),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn", 4.0, 8192),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
            "yarn",
            4.0,
            2048,
        ),
        (
            {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
             "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}},
            "llama3", 8.0, 2048,
        ),
    ],
)  # fmt: skip
def test_rope_scaling_old_and_new(extra: dict[str, Any], kind: str, factor: float, context: int) -> None:
    """transformers 5 moved theta and scaling into `rope_parameters`; both are in the wild."""
    config = parse_hf_config({**LLAMA, **extra}, {})
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == (kind, factor, 500000.0)
    assert config.max_context == context


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [(2, {}, (2,)), ([2, 3], {}, (2, 3)), (2, {"eos_token_id": [7, 2]}, (7, 2)), (None, {"eos_token_id": 5}, (5,)),
     (None, {}, ())],
)  # fmt: skip
def test_eos_ids_come_from_both_files(own: object, generation: dict[str, Any], expected: tuple[int, ...]) -> None:
    """Llama 3's config.json misses <|eot_id|>: without generation_config.json chats would never end."""
    assert parse_hf_config({**LLAMA, "eos_token_id": own}, generation).eos_token_ids == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported"),
        ({"architectures": None}, "none given"),
        ({"hidden_size": None}, "lacks the integer 'hidden_size'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 2}}, "rope_type must be a string"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "lacks the list of numbers 'short_factor'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor of rope type 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling gives 'factor' without a rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "rope_type": "yarn"}}, "has the type 'linear' and the"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "'linear' has the unknown parameter 'beta'"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "unknown parameter 'mrope_section'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 3}},
            "rope_parameters and rope_scaling differ in 'factor'",
        ),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "default"}}}, "has nothing for 'full_attention'"),
        (
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 1e4}},
            },
            "rope_parameters differs by type of layer",
        ),
        ({"rope_theta": 0}, "rope_theta must be greater than 1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number, at least 0, found 'small'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of strings"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 4096"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings must be an integer"),
        ({"layer_types": ["chunked_attention"]}, "layer_types holds 'chunked_attention'"),
        ({"eos_token_id": 1000}, "eos_token_id must name token ids from 0 to 999, found 1000"),
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id '<|im_end|>' is the text of no token"),
        ({"vocab_size": 0}, "config.json: vocab_size must be an integer from 1 to"),
    ],
)
def test_what_is_not_supported_is_said(extra: dict[str, Any], message: str) -> None:
    """Each of these would otherwise serve wrong text or fail deep inside."""
    with pytest.raises(ModelFileError) as caught:
        parse_hf_config({**LLAMA, **extra}, {})
    assert str(caught.value).startswith("config.json: ") and message in str(caught.value)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_scaling", "rope_parameters", "head_dim", "attention_bias",
                                 "sliding_window", "max_window_layers", "layer_types", "quantization_config",
                                 "hidden_act", "tie_word_embeddings", "num_key_value_heads", "rope_theta"])  # fmt: skip
def test_null_is_the_same_as_nothing(key: str) -> None:
    """Writers of configs put null for what they do not know; some of these ended in a TypeError."""
    without = {name: value for name, value in LLAMA.items() if name != key}
    assert parse_hf_config({**LLAMA, key: None}, {"eos_token_id": None}) == parse_hf_config(without, {})


@pytest.mark.parametrize(
    "rope",
    [
        {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_theta": 1e4},
        },
    ],
)
def test_rotary_parameters_by_type_of_layer(rope: dict[str, Any]) -> None:
    """Read as one flat object they had no type and passed for none."""
    config = parse_hf_config({**LLAMA, "rope_parameters": rope, "layer_types": ["full_attention"] * 2}, {})
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == ("linear", 2.0, 5e5)


def test_what_ends_an_answer_does_not_change_what_the_weights_are() -> None:
    """Two servers of the same weights share a store, whichever EOS their files name."""
    assert repr(parse_hf_config(LLAMA, {"eos_token_id": 9})) == repr(parse_hf_config(LLAMA, {}))


def test_a_window_shorter_than_the_context_is_told() -> None:
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 512}
    assert parse_hf_config(mistral, {}).window == 512
    assert parse_hf_config({**mistral, "sliding_window": 2048}, {}).window is None


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "model-Q4.gguf").touch()
    with pytest.raises(ModelFileError, match=r"it holds model-Q4\.gguf: name that file"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_hf_config(tmp_path).eos_token_ids == (9, 2)
