"""The sampling noise (cpu/plain/draw.py): a pure function of (seed, position, token), and really exponential."""

import numpy as np
import pytest

from headwater.devices.cpu.plain.draw import log_noise
from headwater.devices.noise import noise_bits, noise_keys

ALL = np.arange(50_000, dtype=np.uint32)
EDGES = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], dtype=np.uint32)
KEYS = np.array([0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1], dtype=np.uint64)


def _rows(seeds: list[int], positions: list[int], token_ids: np.ndarray = ALL) -> np.ndarray:
    return np.exp([log_noise(token_ids, int(key)) for key in noise_keys(seeds, positions)])


def test_the_bits_are_those_of_the_hash_by_its_definition() -> None:
    """Integers of Python do not wrap, so nothing here depends on numpy's."""

    def mixed(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    ids = np.concatenate((EDGES, ALL[::97]))
    for key in KEYS.tolist():
        low, high = key & 0xFFFFFFFF, key >> 32
        expected = [mixed((mixed(token ^ low) + high) & 0xFFFFFFFF) & 0x7FFFFFFF for token in ids.tolist()]
        assert noise_bits(np.uint64(key), ids).tolist() == expected


def test_noise_is_the_same_in_any_batch_and_any_choice_of_candidates() -> None:
    """A row's noise that depends on its neighbours would make `seed` mean nothing under load."""
    together = _rows([5, 2**63 - 1, 5], [0, 7, 1])
    assert np.array_equal(together[1:2], _rows([2**63 - 1], [7]))
    some = np.array([40_000, 3, 17], dtype=np.uint32)
    assert np.array_equal(_rows([5], [1], some)[0], together[2, some])


def test_seeds_positions_and_tokens_give_unrelated_noise() -> None:
    """Correlated rows would make parallel samples of one prompt repeat each other."""
    rows = _rows([0, 0, 1, 2**32, 2**32 + 1], [0, 1, 0, 0, 0])
    correlations = np.corrcoef(rows)
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 0.02
    assert abs(np.corrcoef(rows[0, 1:], rows[0, :-1])[0, 1]) < 0.02


def test_noise_is_exponential_down_to_its_small_values() -> None:
    """Small values decide who is sampled: coarse ones there would bias rare tokens."""
    noise = _rows(list(range(40)), [0] * 40).astype(np.float64).reshape(-1)
    assert noise.min() > 0
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(1.0, abs=0.005)
    for probability in (0.5, 0.1, 0.01, 1e-3, 1e-4):
        expected = probability * len(noise)
        found = int((noise < -np.log1p(-probability)).sum())
        assert abs(found - expected) < 5 * expected**0.5


@pytest.mark.slow
def test_the_bits_in_pytorch_are_the_same() -> None:
    """As signed 32-bit integers, whose products wrap and whose shifts keep the sign; Triton's kernel is like it."""
    import torch

    def mixed(x: torch.Tensor) -> torch.Tensor:
        x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
        x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
        return x ^ ((x >> 16) & 0xFFFF)

    ids = np.concatenate((EDGES, ALL))
    for key in KEYS:
        low, high = torch.from_numpy(np.array([key]).view(np.int32))
        bits = mixed(mixed(torch.from_numpy(ids.view(np.int32)) ^ low) + high) & 0x7FFFFFFF
        assert np.array_equal(noise_bits(key, ids).view(np.int32), bits.numpy())
