"""Rotary position embedding: its parameters and the frequencies they mean."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

RopeKind = Literal["default", "linear", "llama3", "yarn"]
KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions turn into angles. Fields that a kind does not use keep their defaults.

    `freq_factors` divides each frequency: GGUF files carry the llama3 scaling that way.
    Sources: RoFormer (arXiv 2104.09864); position interpolation (2306.15595); YaRN (2309.00071); Llama 3.1.
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
    attention_factor: float = 1.0  # yarn: both cos and sin are multiplied by it
    freq_factors: tuple[float, ...] = ()

    @property
    def scaled_context(self) -> int:
        """The context that YaRN extends the model to; 0 for other kinds, whose configs state it already."""
        return int(self.original_context * self.factor) if self.kind == "yarn" else 0

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], *, max_position: int) -> "RopeConfig":
        """From a config.json: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
        scaling: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)
        if kind not in KINDS:
            raise ValueError(f"rope type {kind!r} is not supported, known types: {', '.join(KINDS)}")
        partial = scaling.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
        if partial != 1.0:
            raise ValueError(f"partial_rotary_factor {partial} is not supported, only 1.0")
        if kind == "default":
            return cls(theta=theta)
        original = int(scaling.get("original_max_position_embeddings") or max_position)
        factor = scaling.get("factor")
        if factor is None and kind == "yarn":
            factor = max_position / original
        if not isinstance(factor, int | float) or not factor >= 1.0:
            raise ValueError(f"factor of rope type {kind!r} must be a number >= 1, found {factor!r}")
        return cls(
            theta=theta,
            kind=kind,
            factor=float(factor),
            original_context=original,
            low_freq_factor=float(scaling.get("low_freq_factor") or 1.0),
            high_freq_factor=float(scaling.get("high_freq_factor") or 4.0),
            beta_fast=float(scaling.get("beta_fast") or 32.0),
            beta_slow=float(scaling.get("beta_slow") or 1.0),
            truncate=bool(scaling.get("truncate", True)),
            attention_factor=_attention_factor(scaling, float(factor)) if kind == "yarn" else 1.0,
        )

    def inv_freq(self, head_dim: int) -> torch.Tensor:
        """Angle per position of each rotary pair. float32[head_dim / 2]."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inv_freq = 1.0 / self.theta**exponents
        if self.kind == "linear":
            inv_freq = inv_freq / self.factor
        elif self.kind == "llama3":
            inv_freq = self._llama3(inv_freq)
        elif self.kind == "yarn":
            inv_freq = self._yarn(inv_freq, head_dim)
        if self.freq_factors:
            inv_freq = inv_freq / torch.tensor(self.freq_factors, dtype=torch.float32)
        return inv_freq

    def _llama3(self, inv_freq: torch.Tensor) -> torch.Tensor:
        """Keep short wavelengths, divide long ones by `factor`, blend between the two."""
        turns = self.original_context * inv_freq / (2 * math.pi)  # full turns within the original context
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return (1 - blend) * inv_freq / self.factor + blend * inv_freq

    def _yarn(self, inv_freq: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Blend interpolation and extrapolation by how often a dimension turns ("NTK by parts")."""

        def dimension_of(turns: float) -> float:
            ratio = self.original_context / (turns * 2 * math.pi)
            return head_dim * math.log(ratio) / (2 * math.log(self.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = max(high - low, 0.001)
        interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
        return inv_freq / self.factor * interpolated + inv_freq * (1 - interpolated)


def _attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """YaRN's temperature of the attention, as a factor on cos and sin."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(float(scaling["mscale"])) / mscale(float(scaling["mscale_all_dim"]))
    return mscale(1.0)
