"""Linear layers and embeddings in numpy: what kernels/linear/linear.c, quantize.c and embed.c compute.

Shape letters: T rows, I inputs, O outputs. Everything is float32; weights are [O, I].
"""

import numpy as np
import numpy.typing as npt

from headwater.devices.device import SWIGLU_LIMIT, SWIGLU_SLOPE, Activation

Floats = npt.NDArray[np.float32]

GROUP = 32  # inputs that share a scale of their activations


def linear(x: Floats, weight: Floats, bias: Floats | None = None) -> Floats:
    """x W^T + b. [T, I] -> [T, O]"""
    y = x @ weight.T
    return y if bias is None else y + bias


def gated_linear(
    x: Floats, gate: Floats, up: Floats, gate_bias: Floats | None = None, up_bias: Floats | None = None
) -> Floats:
    """silu(gate) * up. [T, I] -> [T, O]"""
    return silu(linear(x, gate, gate_bias)) * linear(x, up, up_bias)


def silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # e^-x is infinite where the result is 0
        return np.divide(x, 1 + np.exp(-x), dtype=np.float32)


def gelu_tanh(x: Floats) -> Floats:
    """GELU with its approximation by tanh."""
    return (0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)))).astype(x.dtype)


def gated(gate: Floats, up: Floats, activation: Activation) -> Floats:
    """activation(gate) * up, or what device.py says of "clamped_swiglu"."""
    if activation == "clamped_swiglu":
        left, right = np.minimum(gate, SWIGLU_LIMIT), np.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT)
        with np.errstate(over="ignore"):
            return (left / (1 + np.exp(-SWIGLU_SLOPE * left)) * (right + 1)).astype(np.float32)
    return (silu(gate) if activation == "silu" else gelu_tanh(gate)) * up


def embed(token_ids: npt.NDArray[np.integer], weight: Floats) -> Floats:
    """Rows of the matrix. [T] -> [T, I]"""
    return weight[token_ids]


def quantize(x: Floats, largest: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Activations as integers up to `largest` (127 or 32767) and the scale of each group of 32.

    [T, I] -> integers [T, I / 32, 32], float32[T, I / 32]. A group that is not finite gets the scale NaN.
    """
    groups = x.reshape(len(x), -1, GROUP)
    top = np.abs(groups).max(axis=-1)
    inverse = np.divide(largest, top, out=np.zeros_like(top), where=top > 1e-30)
    scale = np.where(np.isfinite(groups).all(axis=-1), top / np.float32(largest), np.float32(np.nan))
    return np.rint(np.nan_to_num(groups * inverse[..., None])).astype(np.int64), scale.astype(np.float32)


def quantized(x: Floats, largest: int) -> Floats:
    """The activations that a product with quantised weights sees. [T, I] -> [T, I]"""
    values, scale = quantize(x, largest)
    return (values * scale[..., None]).astype(np.float32).reshape(x.shape)
