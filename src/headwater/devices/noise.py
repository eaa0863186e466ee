"""Random numbers for sampling that are a pure function of (seed, position, token): no generator, no state.

So a request draws the same noise in any batch, slot or process, also after a retraction.
These are the keys and bits; the devices make exponential noise of them (cpu/plain/draw.py, which is the definition,
cpu/kernels/draw.c and cuda/kernels/sampling.py).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NoiseKeys = npt.NDArray[np.uint64]


def noise_keys(seeds: Sequence[int] | NoiseKeys, positions: Sequence[int] | npt.NDArray[np.integer]) -> NoiseKeys:
    """One key per row, out of its request's seed and the position of the token to draw. uint64[rows]"""
    found = _mix64(np.asarray(seeds, dtype=np.uint64).reshape(-1))
    found ^= np.asarray(positions, dtype=np.uint64).reshape(-1)
    return _mix64(found)


def noise_bits(key: np.uint64, token_ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """31 random bits for each token of one row. uint32[n]"""
    low, high = np.uint32(key & np.uint64(0xFFFFFFFF)), np.uint32(key >> np.uint64(32))
    bits = _mix32(token_ids ^ low)
    bits += high
    _mix32(bits, out=bits)
    bits &= np.uint32(0x7FFFFFFF)
    return bits


def _mix64(x: NoiseKeys) -> NoiseKeys:
    """SplitMix64's finalizer (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)  # arrays of uint64 wrap around
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix32(x: npt.NDArray[np.uint32], out: npt.NDArray[np.uint32] | None = None) -> npt.NDArray[np.uint32]:
    """Wellons' lowbias32 integer hash. `out` may be `x`."""
    out = np.bitwise_xor(x, x >> np.uint32(16), out=out)
    out *= np.uint32(0x7FEB352D)
    out ^= out >> np.uint32(15)
    out *= np.uint32(0x846CA68B)
    out ^= out >> np.uint32(16)
    return out
