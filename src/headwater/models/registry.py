"""The served architectures and how their families differ: data, not code."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from headwater.models.experts.config import MIXTRAL_EXPERTS, QWEN3_EXPERTS, ExpertFamily
from headwater.models.fields import Fields


@dataclass(frozen=True, slots=True)
class Family:
    """Architectures that share one forward pass, apart from optional parameters.

    `"config"` as a bias means that `attention_bias` / `mlp_bias` of the config decides.
    """

    name: str
    architectures: tuple[str, ...]  # Hugging Face class names
    gguf_architectures: tuple[str, ...]  # general.architecture in GGUF files
    qkv_bias: Literal["config"] | bool = False
    o_bias: Literal["config"] | bool = False
    mlp_bias: Literal["config"] | bool = False
    qk_norm: bool = False
    sliding_window_switch: str | None = None  # the config key that turns `sliding_window` on; None: always on
    gguf_permutes_qk: bool = False  # llama.cpp stores q and k with rotary pairs interleaved
    experts: ExpertFamily | None = None
    ties_by_default: bool = False  # where the config says nothing of tie_word_embeddings
    has_multipliers: bool = False  # embedding_multiplier and so on
    unrotated_interval: int | None = None  # each such layer has no positions, where the config has no list

    def has_qkv_bias(self, fields: Fields) -> bool:
        return fields.flag("attention_bias", False) if self.qkv_bias == "config" else self.qkv_bias

    def has_o_bias(self, fields: Fields) -> bool:
        return fields.flag("attention_bias", False) if self.o_bias == "config" else self.o_bias

    def has_mlp_bias(self, fields: Fields) -> bool:
        return fields.flag("mlp_bias", False) if self.mlp_bias == "config" else self.mlp_bias

    def scales_of(self, fields: Fields) -> dict[str, float]:
        """The multipliers of ModelConfig that the config gives."""
        if not self.has_multipliers:
            return {}
        return {
            "embedding_scale": fields.number("embedding_multiplier", 1.0),
            "residual_scale": fields.number("residual_multiplier", 1.0),
            "score_scale": fields.number("attention_multiplier", 1.0),
            "logits_divisor": fields.number("logits_scaling", 1.0),
        }

    def unrotated_layers_of(self, fields: Fields) -> tuple[int, ...]:
        """The layers without positions. `no_rope_layers` has a 1 for each layer that is rotated."""
        if self.unrotated_interval is None:
            return ()
        num_layers = fields.integer("num_hidden_layers")
        interval = fields.integer("no_rope_layer_interval", self.unrotated_interval)
        given = fields.raw("no_rope_layers")
        if given is None:
            return tuple(range(interval - 1, num_layers, interval))
        if not isinstance(given, list) or len(given) < num_layers or any(each not in (0, 1) for each in given):
            raise fields.refuse(f"no_rope_layers must be a list of 0 or 1 for each of {num_layers} layers")
        return tuple(index for index in range(num_layers) if given[index] == 0)

    def window_of(self, fields: Fields, max_context: int) -> int | None:
        """The config's sliding window, if it can hide a token. ModelFileError for a layer of unknown kind."""
        layer_types = fields.texts("layer_types")
        for kind in layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise fields.refuse(f"layer_types holds {kind!r}; known: 'full_attention', 'sliding_attention'")
        switch = self.sliding_window_switch
        if "sliding_window" not in fields or (switch is not None and not fields.flag(switch, False)):
            return None
        window = fields.integer("sliding_window")
        if layer_types:
            has_windowed_layer = "sliding_attention" in layer_types
        else:
            num_layers = fields.integer("num_hidden_layers")
            has_windowed_layer = fields.integer("max_window_layers", 0, low=0) < num_layers
        return window if has_windowed_layer and window < max_context else None


FAMILIES = (
    Family(
        name="llama",
        architectures=("LlamaForCausalLM",),
        gguf_architectures=("llama",),
        qkv_bias="config",
        o_bias="config",
        mlp_bias="config",
        sliding_window_switch="use_sliding_window",
        gguf_permutes_qk=True,
    ),
    Family(name="mistral", architectures=("MistralForCausalLM",), gguf_architectures=()),
    Family(
        name="qwen2",
        architectures=("Qwen2ForCausalLM",),
        gguf_architectures=("qwen2",),
        qkv_bias=True,
        sliding_window_switch="use_sliding_window",
    ),
    Family(
        name="qwen3",
        architectures=("Qwen3ForCausalLM",),
        gguf_architectures=("qwen3",),
        qkv_bias="config",
        o_bias="config",
        qk_norm=True,
        sliding_window_switch="use_sliding_window",
    ),
    Family(
        name="qwen3-moe",
        architectures=("Qwen3MoeForCausalLM",),
        gguf_architectures=("qwen3moe",),
        qkv_bias="config",
        o_bias="config",
        qk_norm=True,
        sliding_window_switch="use_sliding_window",
        experts=QWEN3_EXPERTS,
    ),
    Family(
        name="mixtral",
        architectures=("MixtralForCausalLM",),
        gguf_architectures=("llama",),
        gguf_permutes_qk=True,
        experts=MIXTRAL_EXPERTS,
    ),
    Family(
        name="granite",
        architectures=("GraniteForCausalLM",),
        gguf_architectures=(),
        qkv_bias="config",
        o_bias="config",
        mlp_bias="config",
        sliding_window_switch="use_sliding_window",
        has_multipliers=True,
    ),
    Family(
        name="smollm3",
        architectures=("SmolLM3ForCausalLM",),
        gguf_architectures=(),
        qkv_bias="config",
        o_bias="config",
        mlp_bias="config",
        sliding_window_switch="use_sliding_window",
        ties_by_default=True,
        unrotated_interval=4,
    ),
)


def family_of(architecture: str) -> Family:
    """The family of a Hugging Face architecture name, or ValueError."""
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ValueError(f"architecture {architecture!r} is not supported; known architectures: {known}")


def ties_by_default(architectures: Sequence[str]) -> bool:
    """Whether a config that says nothing of it has one matrix for embedding and head."""
    return any(family.ties_by_default for family in FAMILIES if set(family.architectures) & set(architectures))


def family_of_gguf(architecture: str, *, has_experts: bool = False) -> Family:
    """The family of a GGUF file's `general.architecture`, or ValueError. Mixtral's is "llama"."""
    for family in FAMILIES:
        if architecture in family.gguf_architectures and has_experts == (family.experts is not None):
            return family
    known = ", ".join(dict.fromkeys(name for family in FAMILIES for name in family.gguf_architectures))
    raise ValueError(f"GGUF architecture {architecture!r} is not supported; known architectures: {known}")
