"""The shape of a model that the user names: a known one, or that of a config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headwater.models.experts.config import MIXTRAL_EXPERTS, QWEN3_EXPERTS, read_experts
from headwater.models.fields import Fields
from headwater.models.model_files import is_there, read_json_object, without_nulls
from headwater.models.registry import ties_by_default
from headwater.planning.model_shape import MODELS, MXFP4_BYTES, ModelShape

_UNKNOWN_EXPERTS = ("n_routed_experts", "n_shared_experts", "shared_expert_intermediate_size")


def find_model(name: str) -> ModelShape:
    """A model by the name of a known one, or by its config.json (the file or its folder). Raises ValueError."""
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if not is_there(path):
        raise ValueError(f"model must be a config.json, its folder, or one of {', '.join(MODELS)}; found {name!r}")
    return shape_from_config(read_json_object(path), name=path.resolve().parent.name)


def shape_from_config(raw: Mapping[str, Any], *, name: str) -> ModelShape:
    """The shape of a parsed Hugging Face config.json. ValueError for missing fields and for shared experts."""
    fields = Fields(without_nulls(raw), source="config.json")
    unknown = next((key for key in _UNKNOWN_EXPERTS if fields.raw(key)), None)
    if unknown is not None:
        raise fields.refuse(f"has {unknown}: the cost model knows experts as Qwen3-MoE, Mixtral and gpt-oss have them")
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    num_bytes = 4.0 if fields.text("torch_dtype", fields.text("dtype", "")) == "float32" else 2.0
    return ModelShape(
        name=name,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", max(hidden_size // num_heads, 1)),
        vocab_size=fields.integer("vocab_size"),
        ties_embeddings=fields.flag("tie_word_embeddings", ties_by_default(fields.texts("architectures"))),
        max_context=fields.integer("max_position_embeddings", 4096),
        weight_bytes=num_bytes,
        kv_bytes=num_bytes,
        **_experts(fields),
    )


def _experts(fields: Fields) -> dict[str, Any]:
    """The fields of a ModelShape that describe its experts."""
    family = QWEN3_EXPERTS if fields.raw(QWEN3_EXPERTS.size_key) else MIXTRAL_EXPERTS
    is_mxfp4 = fields.inner("quantization_config").raw("quant_method") == "mxfp4"
    if not any(fields.raw(key) for key in ("num_experts", "num_local_experts")):
        return {}
    experts = read_experts(fields, family, num_layers=fields.integer("num_hidden_layers"))
    if experts is None:
        return {}
    return {
        "num_experts": experts.num_experts,
        "experts_per_token": experts.per_token,
        "expert_size": experts.intermediate_size,
        "num_dense_layers": len(experts.dense_layers),
        "expert_bytes": MXFP4_BYTES if is_mxfp4 else None,
    }
