"""RMSNorm and rotary embedding in numpy: the definition that kernels/norm.c and kernels/rotary.c compute."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from headwater.devices.device import RotaryAngles

Floats: TypeAlias = npt.NDArray[Any]  # float32; numpy's types forget it in arithmetic


def rms_norm(x: Floats, weight: Floats, eps: float, *, mean_square: Floats | None = None) -> Floats:
    """[..., size] over the last axis (arXiv 1910.07467). `mean_square` [..., 1]: that of more numbers than `x` has."""
    own = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32) if mean_square is None else mean_square
    return x / np.sqrt(own + np.float32(eps)) * weight


def rotary_angles(positions: npt.NDArray[np.int32], rotary: RotaryAngles) -> tuple[Floats, Floats]:
    """cos and sin of each position's angles, times their factors: float32[T, D / 2] each."""
    angles = (positions.astype(np.float32)[:, None] * rotary.inv_freq).astype(np.float64)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return cos * rotary.factors, sin * rotary.factors


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotate the two halves of each head against each other (arXiv 2104.09864, as NeoX lays it out). [T, heads, D]"""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
