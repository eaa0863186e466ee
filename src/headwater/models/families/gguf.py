"""What GGUF files of single families say in llama.cpp's own way, or leave to its code."""

import math
from collections.abc import Mapping
from typing import Any

from headwater.models.families.norms import Norms
from headwater.models.fields import Fields
from headwater.models.rope import RopeConfig

# keys that only these families have; for others they must be neutral
FAMILY_KEYS: Mapping[str, frozenset[str]] = {
    "granite": frozenset({"embedding_scale", "residual_scale", "attention.scale", "logit_scale"}),
    "gemma3": frozenset({"rope.freq_base_swa"}),
}
_GEMMA3_GLOBAL_INTERVAL = 6  # llama.cpp knows it without a key, and also the next numbers
_GEMMA3_LOCAL_THETA = 10000.0
_GEMMA3_27B_LAYERS = 62  # whose queries are divided by the root of hidden_size / heads
_SMOLLM3_INTERVAL = 4
GPT_OSS, _GPT_OSS_INTERVAL = "gpt-oss", 2  # of its layers every second one has a window, the first one too


def norm_stems(architecture: str, norms: Norms) -> dict[str, str]:
    """llama.cpp's names of a layer's norms, and those of the checkpoint."""
    if architecture == GPT_OSS:  # llama.cpp has Hugging Face's name for the norm before the experts
        return {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}
    stems = {
        "attn_norm": norms.before_attention,
        "post_attention_norm": norms.after_attention,
        "ffn_norm": norms.before_mlp,
        "post_ffw_norm": norms.after_mlp,
    }
    return {stem: name for stem, name in stems.items() if name is not None}


def family_values(architecture: str, model: Fields, *, num_layers: int, head_dim: int) -> dict[str, Any]:
    """The fields of ModelConfig that only this family has. `model` holds the keys below the architecture's name."""
    if architecture == "granite":
        return {
            "embedding_scale": model.number("embedding_scale", 1.0),
            "residual_scale": model.number("residual_scale", 1.0),
            "score_scale": model.number("attention.scale", 0.0) or None,
            "logits_divisor": model.number("logit_scale", 1.0),
        }
    if architecture == GPT_OSS:
        return {"has_sinks": True, "local_layers": tuple(range(0, num_layers, _GPT_OSS_INTERVAL))}
    if architecture == "smollm3":
        return {"unrotated_layers": tuple(range(_SMOLLM3_INTERVAL - 1, num_layers, _SMOLLM3_INTERVAL))}
    if architecture != "gemma3":
        return {}
    hidden_size, num_heads = model.integer("embedding_length"), model.integer("attention.head_count")
    divisor = hidden_size // num_heads if num_layers == _GEMMA3_27B_LAYERS else head_dim
    return {
        "embedding_scale": math.sqrt(hidden_size),
        "score_scale": divisor**-0.5,
        "local_layers": tuple(index for index in range(num_layers) if (index + 1) % _GEMMA3_GLOBAL_INTERVAL),
        "local_rope": RopeConfig(theta=model.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA)),
        "activation": "gelu_tanh",
    }
