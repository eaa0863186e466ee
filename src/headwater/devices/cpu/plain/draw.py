"""The next token of rows of logits in numpy: the definition that kernels/draw.c computes.

`draw` follows the kernel's arithmetic, so both choose the same tokens. numpy has no fused multiply-add; one in float64
differs from it once in about 2 ** 29 times, in the last bit.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.plain.norm import Floats

_Lanes = npt.NDArray[np.uint32]


def argmax(logits: Floats) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """The first of the largest of each row, NaN aside, and whether all of the row is finite. [rows, cols]"""
    ranked = np.where(np.isnan(logits), -np.inf, logits)
    return ranked.argmax(axis=-1).astype(np.int32), np.asarray(np.isfinite(logits).all(axis=-1))


def draw(
    logits: Floats, keys: npt.NDArray[np.uint64], temperatures: Floats, log_min_p: Floats
) -> npt.NDArray[np.int32]:
    """A token of each row, drawn from softmax(logits / temperature) with the row's key (devices/noise.py).

    Tokens less probable than e ** log_min_p times the most probable one are left out.
    """
    scaled = logits / temperatures[:, None]
    lowest = scaled.max(axis=-1, keepdims=True) + log_min_p[:, None]
    tokens = np.arange(logits.shape[1], dtype=np.uint32)
    scores = scaled - np.stack([log_noise(tokens, int(key)) for key in keys])
    return np.where(scaled < lowest, -np.inf, scores).argmax(axis=-1).astype(np.int32)


def log_noise(tokens: _Lanes, key: int) -> Floats:
    """log(E) with E exponential(1): minus the Gumbel noise of these tokens."""
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    bits = _mix32(_mix32(tokens ^ low) + high) & np.uint32(0x7FFFFFFF)
    uniform = _fma(bits.astype(np.float32), np.float32(2.0**-31), np.float32(2.0**-32))
    return _log(_exponential(np.minimum(uniform, np.float32(1.0 - 2.0**-24))))


def _mix32(x: _Lanes) -> _Lanes:
    """Wellons' lowbias32 integer hash."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _log(x: Floats) -> Floats:
    """The exponent, and the series of atanh for a mantissa in [0.75, 1.5)."""
    one = np.float32(1)
    exponent = (x.view(np.int32) - 0x3F400000) >> 23
    m = (x.view(np.int32) - (exponent << 23)).view(np.float32)
    s = (m - one) / (m + one)
    series = _polynomial(s * s, (2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0))
    return _fma(exponent.astype(np.float32), np.float32(0.693147181), series * s)


def _exponential(u: Floats) -> Floats:
    """-log(1 - u): the logarithm where it is exact enough, a series where 1 - u would lose u's digits."""
    series = _polynomial(u, (1 / 5, 1 / 4, 1 / 3, 1 / 2, 1.0))
    return np.where(u < np.float32(0.03), series * u, -_log(np.float32(1) - u))


def _polynomial(x: Floats, coefficients: tuple[float, ...]) -> Floats:
    found = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        found = _fma(found, x, np.float32(coefficient))
    return found


def _fma(a: Floats, b: Floats | np.float32, c: Floats | np.float32) -> Floats:
    return (a.astype(np.float64) * b + c).astype(np.float32)
