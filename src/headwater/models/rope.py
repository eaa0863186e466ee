"""Rotary position embedding: its parameters and their frequencies."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from headwater.models.families.brief_repr import brief_repr
from headwater.models.fields import Fields
from headwater.models.model_files import without_nulls

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn", "longrope")
_OLD_NAMES = {"su": "longrope"}
LayerType = Literal["full_attention", "sliding_attention"]
_LARGEST_FACTOR = 1e6
_COMMON_KEYS = frozenset({"rope_type", "rope_theta", "partial_rotary_factor"})
_LLAMA3_KEYS = frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"})
_YARN_KEYS = frozenset(
    {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor"}
    | {"mscale", "mscale_all_dim", "finetuned"}  # the last one describes the training, and changes nothing
)
_KEYS: dict[RopeKind, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": _LLAMA3_KEYS,
    "yarn": _YARN_KEYS,
    "longrope": frozenset({"factor", "original_max_position_embeddings", "short_factor", "long_factor"})
    | {"attention_factor"},
}


@dataclass(frozen=True, slots=True, repr=False)
class RopeConfig:
    """The parameters of rotary embedding. Fields that a kind does not use keep their defaults.

    `freq_factors` divides each frequency: GGUF files carry the llama3 scaling that way, and LongRoPE is given so.
    Sources: RoFormer (arXiv 2104.09864); position interpolation (2306.15595); YaRN (2309.00071); Llama 3.1; LongRoPE
    (2402.13753).
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the corrected range to whole dimensions
    attention_factor: float = 1.0  # yarn, longrope: both cos and sin are multiplied by it
    freq_factors: tuple[float, ...] = ()
    partial: float = 1.0  # the part of a head that is rotated
    is_short: bool = False  # longrope: its short factors, though the model's context is longer than the original one
    short_factors: tuple[float, ...] = field(default=(), repr=False)  # longrope: what `for_context` may take

    def __repr__(self) -> str:
        return brief_repr(self, last="freq_factors")

    @property
    def scaled_context(self) -> int:
        """The context that YaRN extends the model to; 0 for other kinds, whose configs state it already."""
        return int(self.original_context * self.factor) if self.kind == "yarn" else 0

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, max_position: int) -> "RopeConfig":
        """From a parsed config.json; see `from_fields`."""
        return cls.from_fields(Fields(without_nulls(raw), source="config.json"), max_position=max_position)

    @classmethod
    def from_fields(
        cls,
        fields: Fields,
        *,
        max_position: int,
        layers: LayerType | None = None,
        theta: float = 10000.0,
        partial: float | None = None,
    ) -> "RopeConfig":
        """From a config.json: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before).

        `layers`: the type of layers that it is for, where each has its own; None: it is for all. `theta` and `partial`
        are what a config means that does not say so; None: heads are always rotated as a whole.

        ModelFileError for an unknown kind or parameter: without it the text would be wrong.
        """
        scaling = scaling_of(fields, layers)
        kind = kind_of(scaling)
        if layers != "sliding_attention":
            theta = fields.number("rope_theta", theta)
        theta = scaling.number("rope_theta", theta)
        if theta <= 1.0:
            raise fields.refuse(f"rope_theta must be greater than 1, found {theta}")
        whole = 1.0 if partial is None else partial
        found = scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", whole))
        if partial is None and found != 1.0:
            raise fields.refuse(f"partial_rotary_factor {found} is not supported for this model, only 1.0")
        if not 0 < found <= 1:
            raise fields.refuse(f"partial_rotary_factor must be above 0 and at most 1, found {found}")
        if kind == "default":
            return cls(theta=theta, partial=found)
        if kind == "longrope":
            return cls._longrope(fields, scaling, cls(theta=theta, partial=found, kind=kind), max_position)
        original = scaling.integer("original_max_position_embeddings", max_position)
        original = fields.integer("original_max_position_embeddings", original)  # transformers lets this one win
        factor = scaling.number("factor", max_position / original if kind == "yarn" else 0.0)
        if not 1.0 <= factor <= _LARGEST_FACTOR:
            given = scaling.raw("factor")
            raise fields.refuse(f"factor of rope type {kind!r} must be a number from 1 to 1e6, found {given!r}")
        low, high = scaling.number("low_freq_factor", 1.0), scaling.number("high_freq_factor", 4.0)
        if not 0 < low < high:
            raise fields.refuse(f"low_freq_factor ({low}) must be above 0 and below high_freq_factor ({high})")
        return cls(
            theta=theta,
            kind=kind,
            factor=factor,
            original_context=original,
            low_freq_factor=low,
            high_freq_factor=high,
            beta_fast=scaling.number("beta_fast", 32.0, low=1e-6),
            beta_slow=scaling.number("beta_slow", 1.0, low=1e-6),
            truncate=scaling.flag("truncate", True),
            attention_factor=_attention_factor(scaling, factor) if kind == "yarn" else 1.0,
            partial=found,
        )

    @staticmethod
    def _longrope(fields: Fields, scaling: Fields, plain: "RopeConfig", max_position: int) -> "RopeConfig":
        """Its long factors where the context is longer than the original one, for all positions: KV is shared.

        transformers takes the short factors for as long as a text is short, and then others for the same keys.
        """
        original = scaling.integer("original_max_position_embeddings", 4096)
        original = fields.integer("original_max_position_embeddings", original)  # transformers lets this one win
        factor = scaling.number("factor", max_position / original, low=0.0)
        short = scaling.numbers("short_factor", low=1e-3)
        is_long = max_position > original
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return replace(
            plain,
            factor=factor,
            original_context=original,
            attention_factor=scaling.number("attention_factor", attention, low=0.0),
            freq_factors=scaling.numbers("long_factor", low=1e-3) if is_long else short,
            short_factors=short if is_long else (),
        )

    def for_context(self, context: int) -> "RopeConfig":
        """For a server none of whose texts is longer: LongRoPE's short factors if that is within the original context.

        So does transformers with each such text.
        """
        if not self.short_factors or context > self.original_context:
            return self
        return replace(self, freq_factors=self.short_factors, is_short=True, short_factors=())

    def rotary_dim(self, head_dim: int) -> int:
        """How many numbers of a head are rotated."""
        return int(head_dim * self.partial)

    def with_freq_factors(self, factors: tuple[float, ...]) -> "RopeConfig":
        """The same with each frequency divided by its factor; unchanged without factors."""
        return replace(self, freq_factors=factors)

    def inv_freq(self, head_dim: int) -> npt.NDArray[np.float32]:
        """Angle per position of each rotary pair. float32[head_dim / 2], each power correctly rounded.

        The last ones are zero where only a part of a head is rotated.
        """
        whole, head_dim = head_dim, self.rotary_dim(head_dim)
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
        powers = float(np.float32(self.theta)) ** exponents.astype(np.float64)
        inv_freq = 1.0 / powers.astype(np.float32)
        if self.kind == "linear":
            inv_freq = inv_freq / self.factor
        elif self.kind == "llama3":
            inv_freq = self._llama3(inv_freq)
        elif self.kind == "yarn":
            inv_freq = self._yarn(inv_freq, head_dim)
        if self.freq_factors:
            inv_freq = inv_freq / np.array(self.freq_factors, dtype=np.float32)
        return np.concatenate((inv_freq, np.zeros((whole - head_dim) // 2, dtype=np.float32)))

    def _llama3(self, inv_freq: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Keep short wavelengths, divide long ones by `factor`, blend between the two."""
        turns = self.original_context * inv_freq / (2 * math.pi)  # full turns within the original context
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clip(0.0, 1.0)
        return (1 - blend) * inv_freq / self.factor + blend * inv_freq

    def _yarn(self, inv_freq: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
        """Blend interpolation and extrapolation by how often a dimension turns ("NTK by parts")."""

        def dimension_of(turns: float) -> float:
            ratio = self.original_context / (turns * 2 * math.pi)
            return head_dim * math.log(ratio) / (2 * math.log(self.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = max(high - low, 0.001)
        interpolated = ((np.arange(head_dim // 2, dtype=np.float32) - low) / width).clip(0.0, 1.0)
        return inv_freq / self.factor * interpolated + inv_freq * (1 - interpolated)


def scaling_of(fields: Fields, layers: LayerType | None = None) -> Fields:
    """The rotary parameters of a config.json for one type of layer; None: for all, and all must be the same.

    Parameters without a type are not for sliding layers.
    """
    places = [_of_layers(fields, key, layers) for key in ("rope_parameters", "rope_scaling")]
    merged: dict[str, Any] = {}
    for place in places:
        for key, value in place.items():
            if merged.setdefault(key, value) != value:
                raise fields.refuse(f"rope_parameters and rope_scaling differ in {key!r}: which one is meant?")
    return Fields(merged, source=fields.source)


def kind_of(scaling: Fields) -> RopeKind:
    """The kind of scaling. ModelFileError that names an unknown kind or parameter."""
    name = scaling.text("rope_type", "default")
    if name not in KINDS:
        raise scaling.refuse(f"rope type {name!r} is not supported, known types: {', '.join(KINDS)}")
    kind = cast(RopeKind, name)
    given = [key for key in scaling if key not in _COMMON_KEYS]
    if "rope_type" not in scaling and given:
        raise scaling.refuse(f"rope_scaling gives {given[0]!r} without a rope_type; known types: {', '.join(KINDS)}")
    unknown = [key for key in given if key not in _KEYS[kind]]
    if unknown and not (unknown == ["factor"] and scaling.number("factor") == 1.0):
        raise scaling.refuse(f"rope_scaling of type {kind!r} has the unknown parameter {unknown[0]!r}")
    return kind


def _of_layers(fields: Fields, key: str, layers: LayerType | None) -> dict[str, Any]:
    """The parameters under `key`, `type` under its newer name."""
    inner = fields.inner(key)
    found = {name: inner.raw(name) for name in inner}
    is_by_type = any(isinstance(value, Mapping) for value in found.values())
    if layers is not None:
        if is_by_type:
            found = dict(without_nulls(found).get(layers, {}))
        elif layers == "sliding_attention":
            found = {}
    elif is_by_type:
        used = list(dict.fromkeys(fields.texts("layer_types"))) or ["full_attention"]
        missing = [kind for kind in used if not isinstance(found.get(kind), Mapping)]
        if missing:
            raise fields.refuse(f"{key} is by type of layer, and has nothing for {missing[0]!r}")
        if any(found[kind] != found[used[0]] for kind in used):
            raise fields.refuse(f"{key} differs by type of layer ({', '.join(used)}), which is not supported")
        found = dict(found[used[0]])
    if "type" in found:
        old = found.pop("type")
        if found.setdefault("rope_type", old) != old:
            raise fields.refuse(f"{key} has the type {old!r} and the rope_type {found['rope_type']!r}")
    for old, new in _OLD_NAMES.items():
        if found.get("rope_type") == old:
            found["rope_type"] = new
    return found


def _attention_factor(scaling: Fields, factor: float) -> float:
    """YaRN's temperature of the attention, as a factor on cos and sin."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "attention_factor" in scaling:
        return scaling.number("attention_factor", low=0.0)
    over, under = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    if over and under:
        divisor = mscale(under)
        if divisor <= 0:
            raise scaling.refuse(f"mscale_all_dim {under} is out of range")
        return mscale(over) / divisor
    return mscale(1.0)
