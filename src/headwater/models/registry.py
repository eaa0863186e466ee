"""The served architectures and how their families differ: data, not code."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from headwater.devices.device import Activation
from headwater.models.experts.config import GPT_OSS_EXPERTS, MIXTRAL_EXPERTS, QWEN3_EXPERTS, ExpertFamily
from headwater.models.families.norms import GEMMA_NORMS, GLM4_NORMS, LLAMA_NORMS, OLMO2_NORMS, Norms
from headwater.models.fields import Fields
from headwater.models.rope import LayerType, RopeConfig

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


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
    biases_by_default: bool = False  # where the config says nothing of attention_bias
    partial_rotary: float | None = None  # the part of a head that is rotated by default; None: always all of it
    is_interleaved: bool = False  # rotary pairs are of numbers side by side
    theta: float = 10000.0  # where the config says nothing of rope_theta
    local_theta: tuple[str, float] | None = None  # sliding layers have a rope_theta of this key, and no scaling
    global_interval: int | None = None  # each such layer has no window, where the config has no layer_types
    norms: Norms = LLAMA_NORMS
    norm_offset: float = 0.0
    qk_norm_whole: bool = False
    fused: tuple[str, ...] = ()  # see ModelConfig
    activation_key: str = "hidden_act"
    default_activation: str = "silu"
    scales_embedding: bool = False  # by the root of hidden_size
    score_scale_key: str | None = None  # the config key of a number whose root queries are divided by
    must_be_off: tuple[str, ...] = ()  # options of the config that are not supported
    has_sinks: bool = False
    needs_rope_scaling: bool = False  # a config that says nothing of it would mean something else than no scaling

    def has_qkv_bias(self, fields: Fields) -> bool:
        if self.qkv_bias == "config":
            return fields.flag("attention_bias", self.biases_by_default)
        return self.qkv_bias

    def has_o_bias(self, fields: Fields) -> bool:
        if self.o_bias == "config":
            return fields.flag("attention_bias", self.biases_by_default)
        return self.o_bias

    def has_mlp_bias(self, fields: Fields) -> bool:
        return fields.flag("mlp_bias", False) if self.mlp_bias == "config" else self.mlp_bias

    def scales_of(self, fields: Fields) -> dict[str, float]:
        """The multipliers of ModelConfig that the config gives."""
        if self.scales_embedding:
            return {
                "embedding_scale": math.sqrt(fields.integer("hidden_size")),
                "score_scale": fields.number(self.score_scale_key or "head_dim", 256.0, low=1.0) ** -0.5,
            }
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

    def ropes_of(self, fields: Fields, *, max_position: int) -> tuple[RopeConfig, RopeConfig | None]:
        """The rotary embedding of all layers; or of those without a window, and of the others."""

        def rope(layers: LayerType | None, theta: float) -> RopeConfig:
            return RopeConfig.from_fields(
                fields, max_position=max_position, layers=layers, theta=theta, partial=self.partial_rotary
            )

        if self.needs_rope_scaling and not any(fields.raw(key) for key in ("rope_scaling", "rope_parameters")):
            raise fields.refuse("lacks rope_scaling (or rope_parameters), by which this model was trained")
        if self.local_theta is None:
            return rope(None, self.theta), None
        key, default = self.local_theta
        return rope("full_attention", self.theta), rope("sliding_attention", fields.number(key, default))

    def activation_of(self, fields: Fields) -> Activation:
        """The activation of the MLP. ModelFileError for an unknown one, and for options that are not supported."""
        for key in self.must_be_off:
            if fields.raw(key):
                raise fields.refuse(f"{key} {fields.raw(key)!r} is not supported")
        name = fields.text(self.activation_key, self.default_activation)
        known: dict[str, Activation] = _ACTIVATIONS if self.experts is None else {"silu": "silu"}
        if name not in known:
            names = " and ".join(map(repr, known))
            raise fields.refuse(f"{self.activation_key} {name!r} is not supported, only {names}")
        return known[name]

    def window_of(self, fields: Fields, max_context: int) -> int | None:
        """The config's sliding window, if it can hide a token. ModelFileError for a layer of unknown kind."""
        sliding = self._sliding_layers(fields)
        switch = self.sliding_window_switch
        if "sliding_window" not in fields or (switch is not None and not fields.flag(switch, False)):
            return None
        window = fields.integer("sliding_window")
        return window if sliding and window < max_context else None

    def local_layers_of(self, fields: Fields, max_context: int) -> tuple[int, ...]:
        """The layers with a window or another rotary embedding; empty if that is all layers, or none."""
        sliding = self._sliding_layers(fields)
        if self.local_theta is not None:
            return sliding
        is_all = len(sliding) == fields.integer("num_hidden_layers")
        return () if is_all or self.window_of(fields, max_context) is None else sliding

    def _sliding_layers(self, fields: Fields) -> tuple[int, ...]:
        layer_types = fields.texts("layer_types")
        for kind in layer_types:
            if kind not in get_args(LayerType):
                raise fields.refuse(f"layer_types holds {kind!r}; known: 'full_attention', 'sliding_attention'")
        if layer_types:
            return tuple(index for index, kind in enumerate(layer_types) if kind == "sliding_attention")
        if self.unrotated_interval is not None:
            return self.unrotated_layers_of(fields)
        num_layers = fields.integer("num_hidden_layers")
        if self.global_interval is not None:
            interval = fields.integer("sliding_window_pattern", self.global_interval)
            return tuple(index for index in range(num_layers) if (index + 1) % interval)
        return tuple(range(fields.integer("max_window_layers", 0, low=0), num_layers))


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
        gguf_architectures=("granite",),
        gguf_permutes_qk=True,
        qkv_bias="config",
        o_bias="config",
        mlp_bias="config",
        sliding_window_switch="use_sliding_window",
        has_multipliers=True,
    ),
    Family(
        name="smollm3",
        architectures=("SmolLM3ForCausalLM",),
        gguf_architectures=("smollm3",),
        gguf_permutes_qk=True,
        qkv_bias="config",
        o_bias="config",
        mlp_bias="config",
        sliding_window_switch="use_sliding_window",
        ties_by_default=True,
        unrotated_interval=4,
    ),
    Family(
        name="phi3",
        architectures=("Phi3ForCausalLM",),
        gguf_architectures=(),
        partial_rotary=1.0,
        fused=("qkv_proj", "gate_up_proj"),
    ),
    Family(
        name="glm4",
        architectures=("Glm4ForCausalLM",),
        gguf_architectures=(),
        qkv_bias="config",
        biases_by_default=True,
        sliding_window_switch="use_sliding_window",
        partial_rotary=0.5,
        is_interleaved=True,
        norms=GLM4_NORMS,
        fused=("gate_up_proj",),
    ),
    Family(
        name="olmo2",
        architectures=("Olmo2ForCausalLM",),
        gguf_architectures=(),
        qkv_bias="config",
        o_bias="config",
        sliding_window_switch="use_sliding_window",
        qk_norm=True,
        qk_norm_whole=True,
        norms=OLMO2_NORMS,
    ),
    Family(
        name="olmo3",
        architectures=("Olmo3ForCausalLM",),
        gguf_architectures=(),
        qkv_bias="config",
        o_bias="config",
        qk_norm=True,
        qk_norm_whole=True,
        norms=OLMO2_NORMS,
        theta=500000.0,
        local_theta=("rope_theta", 500000.0),
        global_interval=4,
    ),
    Family(
        name="gemma3",
        architectures=("Gemma3ForCausalLM",),
        gguf_architectures=("gemma3",),
        qkv_bias="config",
        o_bias="config",
        qk_norm=True,
        ties_by_default=True,
        norms=GEMMA_NORMS,
        norm_offset=1.0,
        theta=1000000.0,
        local_theta=("rope_local_base_freq", 10000.0),
        global_interval=6,
        activation_key="hidden_activation",
        default_activation="gelu_pytorch_tanh",
        scales_embedding=True,
        score_scale_key="query_pre_attn_scalar",
        must_be_off=("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"),
    ),
    Family(
        name="gpt-oss",
        architectures=("GptOssForCausalLM",),
        gguf_architectures=("gpt-oss",),
        qkv_bias="config",
        o_bias="config",
        biases_by_default=True,
        theta=150000.0,
        needs_rope_scaling=True,
        global_interval=2,
        experts=GPT_OSS_EXPERTS,
        has_sinks=True,
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
