"""What the server must know of a model before it reads a weight: shapes, rotary embedding, context, EOS."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.models.registry import family_of
from headwater.models.rope import RopeConfig


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense decoder-only transformer with rotary positions, RMSNorm and a gated SiLU MLP.

    Sizes are counts of features, heads or tokens. The biases and `qk_norm` say which optional parameters the
    checkpoint holds. `max_context` counts prompt and output together.
    """

    architecture: str  # the Hugging Face class name
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_context: int
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_context",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the model must be at least 1, found {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, found {self.head_dim}")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter by its Hugging Face checkpoint name, in the order of the forward pass."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for index in range(self.num_layers):
            layer = f"model.layers.{index}."
            shapes[layer + "input_layernorm.weight"] = (hidden,)
            for name, size in (("q", self.q_size), ("k", self.kv_size), ("v", self.kv_size)):
                shapes[f"{layer}self_attn.{name}_proj.weight"] = (size, hidden)
                if self.qkv_bias:
                    shapes[f"{layer}self_attn.{name}_proj.bias"] = (size,)
            if self.qk_norm:
                shapes[layer + "self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[layer + "self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[layer + "self_attn.o_proj.weight"] = (hidden, self.q_size)
            if self.o_bias:
                shapes[layer + "self_attn.o_proj.bias"] = (hidden,)
            shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
            for name, shape in (
                ("gate", (inner, hidden)),
                ("up", (inner, hidden)),
                ("down", (hidden, inner)),
            ):
                shapes[f"{layer}mlp.{name}_proj.weight"] = shape
                if self.mlp_bias:
                    shapes[f"{layer}mlp.{name}_proj.bias"] = (shape[0],)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def read_hf_config(folder: Path) -> ModelConfig:
    """The config of a Hugging Face model folder: config.json, and the EOS ids of generation_config.json.

    Raises ValueError for an unknown architecture or an option that the families here do not have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: it is no Hugging Face model folder")
    generation = folder / "generation_config.json"
    return parse_hf_config(
        json.loads(path.read_text(encoding="utf-8")),
        json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {},
    )


def parse_hf_config(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from the parsed config.json and generation_config.json."""
    architectures = raw.get("architectures") or ["(none given)"]
    family = family_of(architectures[0])
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if not isinstance(raw.get(name), int)]
    if missing:
        raise ValueError(f"config.json lacks the integer {missing[0]!r}")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    if raw.get("quantization_config"):
        raise ValueError("quantization_config is not supported: use the unquantized checkpoint or a GGUF file")
    max_position = int(raw.get("max_position_embeddings") or 2048)
    rope = RopeConfig.from_hf(raw, max_position=max_position)
    max_context = max(max_position, rope.scaled_context)
    family.reject_sliding_window(raw, max_context)
    num_heads = raw["num_attention_heads"]
    return ModelConfig(
        architecture=architectures[0],
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // num_heads,
        rope=rope,
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family.has_qkv_bias(raw),
        o_bias=family.has_o_bias(raw),
        mlp_bias=family.has_mlp_bias(raw),
        qk_norm=family.qk_norm,
        max_context=max_context,
        eos_token_ids=_eos_ids(generation.get("eos_token_id"), raw.get("eos_token_id")),
    )


def _eos_ids(*sources: int | list[int] | None) -> tuple[int, ...]:
    """The union of what generation_config.json and config.json name, in that order."""
    ids: dict[int, None] = {}
    for source in sources:
        if source is not None:
            ids.update(dict.fromkeys([source] if isinstance(source, int) else source))
    return tuple(ids)
