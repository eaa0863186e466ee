"""Random numbers for sampling that are a pure function of (seed, position, token): no generator, no state.

So a request draws the same noise in any batch, slot or process, also after a retraction.
The native kernel native/draw.c computes the same function.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

NoiseKeys = npt.NDArray[np.uint64]

_SMALLEST = 2.0**-32
_LARGEST = 1.0 - 2.0**-24  # the largest float32 below 1: log1p(-1) would be infinite


def noise_keys(seeds: Sequence[int] | NoiseKeys, positions: Sequence[int] | npt.NDArray[np.integer]) -> NoiseKeys:
    """One key per row, out of its request's seed and the position of the token to draw. uint64[rows]"""
    found = _mix64(np.asarray(seeds, dtype=np.uint64).reshape(-1))
    found ^= np.asarray(positions, dtype=np.uint64).reshape(-1)
    return _mix64(found)


def exponential_noise(keys: NoiseKeys, token_ids: torch.Tensor) -> torch.Tensor:
    """Exponential(1) variates E; argmax of p / E over a row samples from p (the Gumbel-max trick).

    `token_ids` is int64[rows, n] or [1, n], shared by all rows; returns float32[rows, n] on its device.
    """
    halves = torch.from_numpy(keys.view(np.int32).reshape(-1, 2)).to(token_ids.device)
    low, high = halves[:, :1], halves[:, 1:]
    bits = _mix32(_mix32(token_ids.to(torch.int32) ^ low).add_(high)).bitwise_and_(0x7FFFFFFF)
    # Small values decide who wins, so they are the ones that float32 must resolve: -log(1 - u), not -log(u).
    uniform = bits.to(torch.float32).mul_(2.0**-31).add_(_SMALLEST)
    return uniform.clamp_(max=_LARGEST).neg_().log1p_().neg_()


def _mix64(x: NoiseKeys) -> NoiseKeys:
    """SplitMix64's finalizer (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)  # arrays of uint64 wrap around
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """Wellons' lowbias32 integer hash, in int32 (whose products wrap and whose shifts keep the sign)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x.mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15) & 0x1FFFF)
    x.mul_(0x846CA68B - (1 << 32))
    x.bitwise_xor_((x >> 16) & 0xFFFF)
    return x
