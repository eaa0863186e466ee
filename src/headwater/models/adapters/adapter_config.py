"""adapter_config.json of PEFT: which modules an adapter changes, by what rank and scale.

What would change the computation in another way than `W + scale * B A` is refused by its name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.models.adapters.names import CONFIG_NAME
from headwater.models.fields import Fields
from headwater.models.model_files import read_json_object

MOST_RANK = 512
BLOCK_OF = {  # the block of a layer that holds a projection
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "gate_up_proj"), "mlp"),
}
_PLAIN_NAME = re.compile(r"\^?[\w.]+")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # values of options that change nothing; null as well
    "bias": ("none",),
    "modules_to_save": ([],),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "layer_replication": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "alora_invocation_tokens": ([],),
    "use_qalora": (False,),
    "arrow_config": (),
    "use_bdlora": (False,),
    "kasa_config": (),
    "monteclora_config": (),
    # others compute the first matrices from the model's own weights and leave the rest of them in the model
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
_OF_TRAINING = frozenset(  # what says how an adapter was made, or repeats what its tensors say
    "task_type auto_mapping peft_version revision inference_mode exclude_modules lora_dropout layers_to_transform "
    "layers_pattern megatron_config megatron_core loftq_config eva_config corda_config lora_ga_config velora_config "
    "qalora_group_size runtime_config ensure_weight_tying".split()
)
_HONOURED = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules base_model_name_or_path".split()
)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The ranks and scales of an adapter's modules. `targets` is empty if the file has a pattern or "all-linear"."""

    rank: int
    alpha: float
    uses_rslora: bool
    targets: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model: str

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in the model."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What the product of a module's two matrices is multiplied by. rsLoRA: arXiv 2312.03732."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.uses_rslora else rank)


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config of an adapter's folder. ModelFileError for damage, and for an option that is not supported."""
    path = folder / CONFIG_NAME
    fields = Fields(read_json_object(path), source=str(path))
    kind = fields.text("peft_type", "LORA")
    if kind != "LORA":
        raise fields.refuse(f"peft_type {kind!r} is not supported, only 'LORA'")
    for name, neutral in _NEUTRAL.items():
        value = fields.raw(name)
        if value is not None and value not in neutral:
            raise fields.refuse(f"{name} {str(value)[:80]!r} is not supported: adapters are pairs of matrices alone")
    unknown = sorted(name for name in set(fields) - _NEUTRAL.keys() - _OF_TRAINING - _HONOURED if fields.raw(name))
    if unknown:
        raise fields.refuse(f"{unknown[0]} is not known here, and may change what the adapter computes")
    return AdapterConfig(
        rank=fields.integer("r", 8, high=MOST_RANK),
        alpha=fields.number("lora_alpha", 8.0),
        uses_rslora=fields.flag("use_rslora", False),
        targets=_targets(fields),
        rank_pattern={name: int(value) for name, value in _pattern(fields, "rank_pattern", low=1, high=MOST_RANK)},
        alpha_pattern=dict(_pattern(fields, "alpha_pattern")),
        base_model=str(fields.raw("base_model_name_or_path") or ""),
    )


def _targets(fields: Fields) -> tuple[str, ...]:
    if isinstance(fields.raw("target_modules"), str):  # a regular expression: the file's tensors say what it matched
        return ()
    targets = fields.texts("target_modules")
    for name in targets:
        if name.rpartition(".")[2] not in BLOCK_OF:
            raise fields.refuse(f"target_modules names {name!r}; adapters are served of {', '.join(BLOCK_OF)}")
    return tuple(targets)


def _pattern(
    fields: Fields, key: str, *, low: float = -math.inf, high: float = math.inf
) -> list[tuple[str, float]]:
    inner, found = fields.inner(key), []
    for name in inner:
        if not _PLAIN_NAME.fullmatch(name):
            raise fields.refuse(f"{key} {name!r} is a regular expression; names of modules are supported")
        value = inner.number(name, low=low)
        if value > high or (low == 1 and not value.is_integer()):
            raise fields.refuse(f"{key} of {name!r} must be an integer from 1 to {high:g}, found {value:g}")
        found.append((name, value))
    return found


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first name that the module's name ends with; behind a ^, of all of it (PEFT's rule)."""
    for name, value in pattern.items():
        whole = name.removeprefix("^")
        if module == whole or (whole == name and module.endswith(f".{name}")):
            return value
    return default
