"""config.json in the spellings of all versions, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from headwater.models.config import parse_hf_config, read_hf_config

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
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of rope type 'linear'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor of rope type 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"vocab_size": 0}, "vocab_size of the model must be at least 1"),
    ],
)
def test_what_is_not_supported_is_said(extra: dict[str, Any], message: str) -> None:
    """Each of these would otherwise serve wrong text or fail deep inside."""
    with pytest.raises(ValueError, match=message):
        parse_hf_config({**LLAMA, **extra}, {})


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_hf_config(tmp_path).eos_token_ids == (9, 2)
