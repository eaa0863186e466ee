"""gpt-oss with experts in MXFP4, in the layout of the published folders: what the tests of it share. numpy alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.devices.safetensors_header import build_header

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

NUMBERS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # E2M1
BLOCK = 32
# what the families here read of the config.json of openai/gpt-oss-20b and -120b
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "eos_token_id": 200002, "experts_per_token": 4,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip
GPT_OSS_120B = GPT_OSS_20B | {
    "num_hidden_layers": 36, "num_local_experts": 128, "layer_types": ["sliding_attention", "full_attention"] * 18,
}  # fmt: skip
TINY = GPT_OSS_20B | {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 13,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 256,
    "rope_scaling": GPT_OSS_20B["rope_scaling"] | {"factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


def to_mxfp4(values: Floats) -> tuple[Bytes, Bytes]:
    """The nearest numbers of each block of 32: [..., out, in] to blocks [..., out, in / 32, 16] and their scales."""
    grouped = values.reshape(*values.shape[:-1], -1, BLOCK)
    largest = np.abs(grouped).max(axis=-1)
    exponents = np.clip(np.floor(np.log2(np.maximum(largest, 1e-30))) - 2, -127, 127).astype(np.int64)
    scaled = grouped / np.exp2(exponents)[..., None]
    codes = np.abs(scaled[..., None] - NUMBERS).argmin(axis=-1).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).astype(np.uint8)


def from_mxfp4(blocks: Bytes, scales: Bytes) -> Floats:
    """By the definition of the format. [..., out, in]"""
    codes = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*blocks.shape[:-1], BLOCK)
    numbers = np.ldexp(NUMBERS[codes], scales.astype(np.int32)[..., None] - 127)
    return numbers.reshape(*blocks.shape[:-2], -1).astype(np.float32)


def plain_names(config: Mapping[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer outside of its experts' matrices."""
    hidden, heads, kv_heads, dim = (
        config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    num, inner = config["num_local_experts"], config["intermediate_size"]
    prefix = f"model.layers.{layer}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    shapes: dict[str, tuple[int, ...]] = {attention + "sinks": (heads,)}
    for name, (rows, columns) in {
        "q_proj": (heads * dim, hidden), "k_proj": (kv_heads * dim, hidden), "v_proj": (kv_heads * dim, hidden),
        "o_proj": (hidden, heads * dim),
    }.items():  # fmt: skip
        shapes |= {f"{attention}{name}.weight": (rows, columns), f"{attention}{name}.bias": (rows,)}
    return shapes | {
        mlp + "router.weight": (num, hidden), mlp + "router.bias": (num,),
        mlp + "experts.gate_up_proj_bias": (num, 2 * inner), mlp + "experts.down_proj_bias": (num, hidden),
        prefix + "input_layernorm.weight": (hidden,), prefix + "post_attention_layernorm.weight": (hidden,),
    }  # fmt: skip


def draw_tensors(config: Mapping[str, Any] = TINY, *, seed: int = 0) -> dict[str, npt.NDArray]:
    """Random tensors of a whole folder, large enough that text does not repeat itself."""
    random = np.random.default_rng(seed)
    hidden, inner, num = (config[key] for key in ("hidden_size", "intermediate_size", "num_local_experts"))
    top = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "lm_head.weight": (config["vocab_size"], hidden),
    }
    shapes = top | {"model.norm.weight": (hidden,)}
    stacks: dict[str, npt.NDArray] = {}
    for layer in range(config["num_hidden_layers"]):
        shapes |= plain_names(config, layer)
        stem = f"model.layers.{layer}.mlp.experts."
        for name, shape in {"gate_up_proj": (num, 2 * inner, hidden), "down_proj": (num, hidden, inner)}.items():
            values = random.normal(0, 0.15, size=shape).astype(np.float32)
            stacks[f"{stem}{name}_blocks"], stacks[f"{stem}{name}_scales"] = to_mxfp4(values)
    tensors: dict[str, npt.NDArray] = {}
    for name, shape in shapes.items():
        size = 1.0 if name.endswith("sinks") else 0.2 if len(shape) == 1 or name.endswith("_bias") else 0.15
        tensors[name] = random.normal(1.0 if name.endswith("norm.weight") else 0.0, size, shape).astype(np.float32)
    return tensors | stacks


def write_folder(
    folder: Path, tensors: Mapping[str, npt.NDArray], config: Mapping[str, Any] = TINY, **changes: Any
) -> Path:
    """`changes`: other values of the config; None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = {key: value for key, value in (dict(config) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(changed))
    names = {"float32": "F32", "uint8": "U8", "float16": "F16", "int32": "I32"}
    entries = [(name, names[values.dtype.name], values.shape) for name, values in tensors.items()]
    data = b"".join(np.ascontiguousarray(values).tobytes() for values in tensors.values())
    (folder / "model.safetensors").write_bytes(build_header(entries) + data)
    return folder


def widened(tensors: Mapping[str, npt.NDArray]) -> dict[str, npt.NDArray]:
    """The same model in the plain form: stacks [experts, in, out], as transformers holds them."""
    found = {name: values for name, values in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for name, blocks in tensors.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            found[stem] = np.ascontiguousarray(from_mxfp4(blocks, tensors[stem + "_scales"]).swapaxes(1, 2))
    return found
