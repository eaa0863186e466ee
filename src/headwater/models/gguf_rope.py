"""Rotary parameters of a GGUF file's metadata, with llama.cpp's names and meanings."""

from typing import Any

import numpy as np

from headwater.models.fields import Fields
from headwater.models.gguf_file import GGUFFile
from headwater.models.rope import RopeConfig

FREQ_FACTORS = "rope_freqs.weight"  # a tensor: llama3's scaling as one divisor per frequency
_KINDS = ("none", "linear", "yarn")
_TYPE, _FACTOR = "rope.scaling.type", "rope.scaling.factor"
_OLD_FACTOR = "rope.scale_linear"  # before there were types
_ORIGINAL = "rope.scaling.original_context_length"
_BETAS = {"rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow"}
ROPE_KEYS = frozenset({"rope.freq_base", _TYPE, _FACTOR, _OLD_FACTOR, _ORIGINAL, "rope.scaling.finetuned", *_BETAS})
ROPE_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}


def read_gguf_rope(
    file: GGUFFile, model: Fields, *, head_dim: int, context: int, truncates: bool = True
) -> RopeConfig:
    """The rotary parameters. `model` holds the keys below the architecture's name. `truncates`: RopeConfig's, of YaRN.

    As in llama.cpp a factor without a type is linear, a factor of 0 is none, and with the type `none` factors are
    not used. ModelFileError for an unknown type, and for a factor that is missing or given twice.
    """
    theta = model.number("rope.freq_base", 10000.0)
    scaling: dict[str, Any] = {"rope_theta": theta}
    factor = _factor(model)
    kind = model.text(_TYPE, "none" if factor is None else "linear")
    if kind not in _KINDS:
        raise model.refuse(f"{_TYPE} {kind!r} is not supported, known types: {', '.join(_KINDS)}")
    if kind != "none":
        if factor is None:
            raise model.refuse(f"{_TYPE} is {kind!r}, but {_FACTOR} is missing")
        scaling |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            scaling |= {"original_max_position_embeddings": model.integer(_ORIGINAL, context), "truncate": truncates}
            scaling |= {ours: model.number(key) for key, ours in _BETAS.items() if key in model}
    rope = RopeConfig.from_fields(Fields({"rope_parameters": scaling}, source=model.source), max_position=context)
    return rope.with_freq_factors(_freq_factors(file, model, num_pairs=head_dim // 2))


def _factor(model: Fields) -> float | None:
    given = {key: model.number(key) for key in (_FACTOR, _OLD_FACTOR) if key in model}
    factors = {factor for factor in given.values() if factor != 0.0}
    if len(factors) > 1:
        raise model.refuse(f"{_FACTOR} and {_OLD_FACTOR} differ: {given}")
    return factors.pop() if factors else None


def _freq_factors(file: GGUFFile, model: Fields, *, num_pairs: int) -> tuple[float, ...]:
    tensor = file.tensors.get(FREQ_FACTORS)
    if tensor is None:
        return ()
    if tensor.shape != (num_pairs,):
        raise model.refuse(f"tensor {FREQ_FACTORS!r} has shape {list(tensor.shape)}, expected [{num_pairs}]")
    factors = file.load(tensor).to_float32()
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise model.refuse(f"tensor {FREQ_FACTORS!r} must hold positive numbers")
    return tuple(float(factor) for factor in factors)
