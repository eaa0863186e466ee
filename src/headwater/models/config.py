"""A model's config, read before any weight: shapes, rotary embedding, context, end tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headwater.devices.device import Activation
from headwater.models.end_tokens import named_end_ids, union, vocabulary_end_ids, within
from headwater.models.experts.config import ExpertsConfig, read_experts
from headwater.models.families.brief_repr import brief_repr
from headwater.models.families.norms import LLAMA_NORMS, Norms
from headwater.models.fields import Fields
from headwater.models.model_files import ModelFileError, is_there, read_json_if_there, read_json_object, without_nulls
from headwater.models.quantised.quantization_config import read_quantisation
from headwater.models.quantised.scheme import Quantisation
from headwater.models.registry import family_of
from headwater.models.rope import RopeConfig
from headwater.models.vocabulary import Vocabulary, read_folder_vocabulary

# far beyond any model: a larger number is damage, and must not be allocated or iterated over
MOST_LAYERS, MOST_VOCABULARY, MOST_FEATURES, MOST_CONTEXT = 1 << 12, 1 << 24, 1 << 20, 1 << 28


@dataclass(frozen=True, slots=True, repr=False)
class ModelConfig:
    """A decoder-only transformer with rotary positions, RMSNorm and gated MLPs, or experts in place of them.

    Sizes are counts of features, heads or tokens. The biases and `qk_norm` say which optional parameters the
    checkpoint holds. `max_context` counts prompt and output together. The `repr` names what decides the KV: it is part
    of `weights_id`. Fields behind `eos_token_ids` are in it only where they are not the default, so that a model keeps
    its identity when others get new fields.
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
    window: int | None = None  # the most tokens that a query of a local layer sees, if fewer than max_context
    eos_token_ids: tuple[int, ...] = field(default=(), repr=False)  # they change no KV
    quantisation: Quantisation | None = field(default=None, repr=False)  # named in `weights_id` by itself
    experts: ExpertsConfig | None = None
    embedding_scale: float = 1.0  # embeddings are multiplied by it
    residual_scale: float = 1.0  # and what every block adds to the residual stream
    score_scale: float | None = None  # and queries times keys; None: head_dim ** -0.5
    logits_divisor: float = 1.0
    unrotated_layers: tuple[int, ...] = ()  # whose attention knows no positions
    local_layers: tuple[int, ...] = ()  # empty: all, if there is a window
    local_rope: RopeConfig | None = None  # of local layers, if it is another
    is_interleaved: bool = False  # rotary pairs are of numbers side by side
    norms: Norms = LLAMA_NORMS
    norm_offset: float = 0.0  # norms multiply by their weight plus this
    qk_norm_whole: bool = False  # the QK-norm is of all heads together
    activation: Activation = "silu"
    fused: tuple[str, ...] = ()  # matrices that are one in the checkpoint: "qkv_proj", "gate_up_proj"
    has_sinks: bool = False  # a learnt score more in the softmax of each head, without a value

    def __repr__(self) -> str:
        return brief_repr(self, last="eos_token_ids")

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
        for name in ("embedding_scale", "residual_scale", "score_scale", "logits_divisor"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} of the model must be above 0, found {getattr(self, name)}")
        for rope in (self.rope, self.local_rope):
            if rope is not None and (rope.rotary_dim(self.head_dim) % 2 or rope.rotary_dim(self.head_dim) < 2):
                raise ValueError(f"partial_rotary_factor {rope.partial} of {self.head_dim} is no even number")
            for factors in () if rope is None else (rope.freq_factors, rope.short_factors):
                if rope is not None and len(factors) not in (0, rope.rotary_dim(self.head_dim) // 2):
                    raise ValueError(
                        f"there are {len(factors)} rotary factors for {rope.rotary_dim(self.head_dim) // 2} pairs"
                    )
        if self.local_rope is not None and self.local_rope.partial != self.rope.partial:
            raise ValueError("partial_rotary_factor differs by type of layer, which is not supported")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def for_context(self, context: int | None) -> "ModelConfig":
        """The config for a server whose texts have at most so many tokens; None: as many as the model can have."""
        return self if context is None else replace(self, rope=self.rope.for_context(context))

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of a layer; None if it has none."""
        if layer in self.unrotated_layers:
            return None
        return self.local_rope if self.local_rope is not None and layer in self.local_layers else self.rope

    def window_of(self, layer: int) -> int | None:
        """How many tokens a query of the layer sees, its own included; None: all before it."""
        return self.window if not self.local_layers or layer in self.local_layers else None

    @property
    def qkv_names(self) -> tuple[str, ...]:
        """The matrices of the checkpoint that make queries, keys and values."""
        return ("qkv_proj",) if "qkv_proj" in self.fused else ("q_proj", "k_proj", "v_proj")

    @property
    def gate_up_names(self) -> tuple[str, ...]:
        """The matrices of the checkpoint that make both halves of a gated MLP."""
        return ("gate_up_proj",) if "gate_up_proj" in self.fused else ("gate_proj", "up_proj")

    @property
    def rotary_pairs(self) -> int:
        """How many pairs of a head's numbers are rotated."""
        return self.rope.rotary_dim(self.head_dim) // 2

    @property
    def active_share(self) -> float:
        """The part of all parameters that one token is multiplied by: all but other tokens' experts."""
        if self.experts is None:
            return 1.0
        num_layers, inner = self.num_layers - len(self.experts.dense_layers), self.experts.intermediate_size
        of_one = 3 * self.hidden_size * inner + self.experts.has_bias * (self.hidden_size + 2 * inner)
        of_experts = num_layers * self.experts.num_experts * of_one
        total = sum(math.prod(shape) for shape in self.parameter_shapes().values())
        return 1.0 - of_experts * (1.0 - self.experts.active_share) / total

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter by its Hugging Face checkpoint name, in the order of the forward pass."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for index in range(self.num_layers):
            layer = f"model.layers.{index}."
            for block in self.norms.blocks:
                if block == "self_attn":
                    shapes.update(self._attention_shapes(layer + "self_attn."))
                elif block != "mlp":
                    shapes[f"{layer}{block}.weight"] = (hidden,)
                elif self.experts is not None and index not in self.experts.dense_layers:
                    shapes.update(self.experts.shapes(index, hidden))
                else:
                    shapes.update(self._mlp_shapes(layer + "mlp."))
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def _attention_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        sizes = {"q_proj": self.q_size, "k_proj": self.kv_size, "v_proj": self.kv_size}
        if "qkv_proj" in self.fused:
            sizes = {"qkv_proj": sum(sizes.values())}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in sizes.items():
            shapes[f"{prefix}{name}.weight"] = (size, self.hidden_size)
            if self.qkv_bias:
                shapes[f"{prefix}{name}.bias"] = (size,)
        if self.qk_norm:
            q, k = (self.q_size, self.kv_size) if self.qk_norm_whole else (self.head_dim, self.head_dim)
            shapes |= {prefix + "q_norm.weight": (q,), prefix + "k_norm.weight": (k,)}
        shapes[prefix + "o_proj.weight"] = (self.hidden_size, self.q_size)
        if self.o_bias:
            shapes[prefix + "o_proj.bias"] = (self.hidden_size,)
        if self.has_sinks:
            shapes[prefix + "sinks"] = (self.num_heads,)
        return shapes

    def _mlp_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        matrices = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
        if "gate_up_proj" in self.fused:
            matrices = {"gate_up_proj": (2 * inner, hidden)}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in (matrices | {"down_proj": (hidden, inner)}).items():
            shapes[f"{prefix}{name}.weight"] = shape
            if self.mlp_bias:
                shapes[f"{prefix}{name}.bias"] = (shape[0],)
        return shapes


def read_hf_config(folder: Path, *, architecture: str | None = None) -> ModelConfig:
    """The config of a Hugging Face model folder: config.json, and the ends that its other files know.

    `architecture` is the default for a config that names none.

    ModelFileError for an unknown architecture, an option that the families here do not have, and a damaged file.
    """
    path = folder / "config.json"
    if not is_there(path):
        others = sorted(each.name for each in folder.glob("*.gguf"))
        hint = f"; it holds {others[0]}: name that file" if others else ""
        raise ModelFileError(folder, f"has no config.json: it is no Hugging Face model folder{hint}")
    default = {} if architecture is None else {"architectures": [architecture]}
    return parse_hf_config(
        default | read_json_object(path),
        read_json_if_there(folder / "generation_config.json"),
        vocabulary=read_folder_vocabulary(folder),
        folder=folder,
    )


def parse_hf_config(
    raw: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    vocabulary: Vocabulary | None = None,
    folder: Path | None = None,
) -> ModelConfig:
    """A ModelConfig from the parsed config.json and generation_config.json; `folder` is named in errors."""
    place = "" if folder is None else f"{folder}/"
    fields = Fields(without_nulls(raw), source=f"{place}config.json")
    architectures = fields.texts("architectures") or ["(none given)"]
    try:
        family = family_of(architectures[0])
    except ValueError as error:
        raise fields.refuse(str(error)) from None
    max_position = fields.integer("max_position_embeddings", 2048, high=MOST_CONTEXT)
    rope, local_rope = family.ropes_of(fields, max_position=max_position)
    max_context = max(max_position, rope.scaled_context)
    if max_context > MOST_CONTEXT:
        raise fields.refuse(f"the context of {max_context} tokens is out of range: at most {MOST_CONTEXT}")
    num_heads = fields.integer("num_attention_heads", high=MOST_FEATURES)
    hidden_size = fields.integer("hidden_size", high=MOST_FEATURES)
    num_layers = fields.integer("num_hidden_layers", high=MOST_LAYERS)
    vocab_size = fields.integer("vocab_size", high=MOST_VOCABULARY)
    ends = Fields(without_nulls(generation), source=f"{place}generation_config.json")
    known = vocabulary or Vocabulary()
    named = [named_end_ids(source, known, vocab_size=vocab_size) for source in (ends, fields)]
    quantisation = read_quantisation(fields)
    is_stacked = family.experts is not None and family.experts.is_stacked
    if quantisation is not None and is_stacked != (quantisation.method == "mxfp4"):
        raise fields.refuse(
            f"quantization_config.quant_method {quantisation.method!r} is not supported of {architectures[0]}"
        )
    try:
        return ModelConfig(
            architecture=architectures[0],
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size", high=MOST_FEATURES),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.integer("num_key_value_heads", num_heads, high=MOST_FEATURES),
            head_dim=fields.integer("head_dim", max(hidden_size // num_heads, 1), high=MOST_FEATURES),
            rope=rope,
            norm_eps=fields.number("rms_norm_eps", 1e-6, low=0.0),
            tie_word_embeddings=fields.flag("tie_word_embeddings", family.ties_by_default),
            qkv_bias=family.has_qkv_bias(fields),
            o_bias=family.has_o_bias(fields),
            mlp_bias=family.has_mlp_bias(fields),
            qk_norm=family.qk_norm,
            max_context=max_context,
            window=family.window_of(fields, max_context),
            eos_token_ids=union(*named, within(vocabulary_end_ids(known), vocab_size=vocab_size)),
            quantisation=quantisation,
            experts=None if family.experts is None else read_experts(fields, family.experts, num_layers=num_layers),
            **family.scales_of(fields),
            unrotated_layers=family.unrotated_layers_of(fields),
            local_layers=family.local_layers_of(fields, max_context),
            local_rope=local_rope,
            is_interleaved=family.is_interleaved,
            norms=family.norms,
            norm_offset=family.norm_offset,
            qk_norm_whole=family.qk_norm_whole,
            activation=family.activation_of(fields),
            fused=family.fused,
            has_sinks=family.has_sinks,
        )
    except ModelFileError:
        raise
    except ValueError as error:
        raise ModelFileError(fields.source, str(error)) from None
