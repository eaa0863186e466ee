"""The next token of rows of logits in numpy: the definition that kernels/draw.c computes.

`draw` follows the kernel's arithmetic, so both choose the same tokens. numpy has no fused multiply-add; one in float64
differs from it once in about 2 ** 29 times, in the last bit.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.plain.norm import Floats
from headwater.devices.noise import noise_bits


def argmax(logits: Floats) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """The first of the largest of each row, NaN aside, and whether all of the row is finite. [rows, cols]"""
    ranked = np.where(np.isnan(logits), -np.inf, logits)
    return ranked.argmax(axis=-1).astype(np.int32), np.asarray(np.isfinite(logits).all(axis=-1))


def is_allowed(mask: npt.NDArray[np.uint32], num_tokens: int) -> npt.NDArray[np.bool_]:
    """A mask by token: bit t % 32 of word t // 32 stands for token t. bool[num_tokens]"""
    tokens = np.arange(num_tokens)
    return (mask[tokens // 32] >> (tokens % 32).astype(np.uint32) & 1).astype(np.bool_)


def masked_argmax(row: Floats, mask: npt.NDArray[np.uint32]) -> int:
    """The first of the largest allowed logits of a row; the first allowed token if all are -infinity or NaN."""
    allowed = is_allowed(mask, len(row))
    ranked = np.where(allowed & ~np.isnan(row), row, -np.inf)
    return int(ranked.argmax() if ranked.max() > -np.inf else allowed.argmax())


def draw(
    row: Floats,
    key: int,
    *,
    temperature: float | np.floating = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    log_min_p: float | np.floating = -np.inf,
    mask: npt.NDArray[np.uint32] | None = None,
) -> int:
    """A token, drawn from softmax(row / temperature) with the key of its noise (devices/noise.py), of those kept.

    top_k (0: all) comes first; top_p then keeps the fewest most probable tokens whose probabilities, renormalised after
    top_k, sum to it; tokens less probable than e ** log_min_p times the most probable one go last. Of equal logits all
    are kept or none. What a `mask` forbids has no probability from the start.
    """
    scaled = row / np.float32(temperature)
    if mask is not None:
        allowed = is_allowed(mask, len(row))
        scaled = np.where(allowed, scaled, np.float32(-np.inf))
        if scaled.max() == -np.inf:
            return int(allowed.argmax())  # a bias or min_new_tokens forbids the rest, and the grammar prevails
    if not np.isfinite(scaled.max()):
        return 0  # any token will do: the row's request fails
    kept = np.flatnonzero(scaled >= _lowest_kept(scaled, top_k, top_p, np.float32(log_min_p)))
    return int(kept[(scaled[kept] - log_noise(kept.astype(np.uint32), key)).argmax()])


def _lowest_kept(scaled: Floats, top_k: int, top_p: float, log_min_p: np.floating) -> np.floating:
    if top_k <= 0 and top_p >= 1:
        return scaled.max() + log_min_p
    ordered = -np.sort(-scaled)
    if 0 < top_k < len(ordered):
        ordered = ordered[ordered >= ordered[top_k - 1]]
    if top_p < 1:
        sums = np.cumsum(np.exp(ordered - scaled.max()), dtype=np.float64)
        ordered = ordered[: 1 + int((sums[:-1] < top_p * sums[-1]).sum())]
    return max(ordered[-1], scaled.max() + log_min_p)


def log_noise(tokens: npt.NDArray[np.uint32], key: int) -> Floats:
    """log(E) with E exponential(1): minus the Gumbel noise of these tokens."""
    bits = noise_bits(np.uint64(key), tokens)
    uniform = _fma(bits.astype(np.float32), np.float32(2.0**-31), np.float32(2.0**-32))
    return _log(_exponential(np.minimum(uniform, np.float32(1.0 - 2.0**-24))))


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
