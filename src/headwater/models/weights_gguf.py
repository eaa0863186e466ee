"""Config and weights of a GGUF file, under Hugging Face names and in Hugging Face's order of rows."""

import re
from collections.abc import Mapping

import numpy as np
import torch
from gguf.quants import dequantize

from headwater.models.config import ModelConfig
from headwater.models.gguf_file import GGUFFile
from headwater.models.registry import family_of_gguf
from headwater.models.rope import RopeConfig

_FREQ_FACTORS = "rope_freqs.weight"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFWeights:
    """The tensors of a GGUF file, dequantised to float32 one at a time.

    llama.cpp stores the q and k rows of llama models with the two halves of each rotary pair side by side;
    `load` puts them back (see `_unpermute`).
    """

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._file = file
        self._config = config
        self._permuted = family_of_gguf(file.metadata["general.architecture"]).gguf_permutes_qk
        self._names = {_hf_name(name): name for name in file.tensors if name != _FREQ_FACTORS}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: self._file.tensors[stored].shape for name, stored in self._names.items()}

    def load(self, name: str) -> torch.Tensor:
        tensor = self._file.tensors[self._names[name]]
        weight = dequantize(self._file.raw(tensor), tensor.type).astype(np.float32, copy=False).reshape(tensor.shape)
        if self._permuted and ".self_attn.q_proj." in name:
            weight = _unpermute(weight, self._config.num_heads)
        elif self._permuted and ".self_attn.k_proj." in name:
            weight = _unpermute(weight, self._config.num_kv_heads)
        return torch.from_numpy(weight if weight.flags.writeable else weight.copy())


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """The config that a GGUF file's metadata and tensor names state."""
    meta = file.metadata
    family = family_of_gguf(meta.get("general.architecture", "(none given)"))
    prefix = meta["general.architecture"] + "."

    def need(key: str) -> int:
        if not isinstance(meta.get(prefix + key), int):
            raise ValueError(f"{file.path.name} lacks the metadata key {prefix + key!r}")
        return meta[prefix + key]

    hidden_size, num_heads = need("embedding_length"), need("attention.head_count")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path.name} lacks tensor 'token_embd.weight'")
    context = need("context_length")
    return ModelConfig(
        architecture=family.architectures[0],
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden_size,
        intermediate_size=need("feed_forward_length"),
        num_layers=need("block_count"),
        num_heads=num_heads,
        num_kv_heads=meta.get(prefix + "attention.head_count_kv", num_heads),
        head_dim=meta.get(prefix + "attention.key_length", hidden_size // num_heads),
        rope=_rope(file, prefix, context),
        norm_eps=float(meta.get(prefix + "attention.layer_norm_rms_epsilon", 1e-5)),
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        max_context=context,
        eos_token_ids=_eos_ids(meta),
    )


def _rope(file: GGUFFile, prefix: str, context: int) -> RopeConfig:
    """Rotary parameters. `rope_freqs.weight` carries llama3's scaling as one divisor per frequency."""
    meta = file.metadata
    theta = float(meta.get(prefix + "rope.freq_base", 10000.0))
    kind = meta.get(prefix + "rope.scaling.type", "none")
    if _FREQ_FACTORS in file.tensors:
        tensor = file.tensors[_FREQ_FACTORS]
        factors = dequantize(file.raw(tensor), tensor.type)
        return RopeConfig(theta=theta, freq_factors=tuple(float(factor) for factor in factors))
    if kind == "none":
        return RopeConfig(theta=theta)
    original = meta.get(prefix + "rope.scaling.original_context_length")
    scaling = {"rope_type": kind, "rope_theta": theta, "factor": meta.get(prefix + "rope.scaling.factor")}
    if original:
        scaling["original_max_position_embeddings"] = original
    return RopeConfig.from_hf({"rope_parameters": scaling}, max_position=context)


def _eos_ids(meta: Mapping[str, object]) -> tuple[int, ...]:
    """End-of-text and end-of-turn, where given."""
    ids = (meta.get("tokenizer.ggml.eos_token_id"), meta.get("tokenizer.ggml.eot_token_id"))
    return tuple(dict.fromkeys(id for id in ids if isinstance(id, int)))


def _hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a name that is not known stays and fails the check of shapes."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None:
        return name
    layer, stem, kind = match.groups()
    if layer is None:
        return f"{_TOP[stem]}.{kind}" if stem in _TOP else name
    return f"model.layers.{layer}.{_IN_LAYER[stem]}.{kind}" if stem in _IN_LAYER else name


def _unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from (x0, y0, x1, y1, ...) back to (x0, x1, ..., y0, y1, ...). [rows] or [rows, in]."""
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)
