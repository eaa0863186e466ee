"""The sampling noise: a pure function of (seed, position, token), and really exponential."""

import math

import pytest
import torch

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.native_library import native_library
from headwater.devices.noise import exponential_noise, noise_keys

pytestmark = pytest.mark.slow

ALL = torch.arange(50_000)[None]


def test_noise_is_the_same_in_any_batch_and_any_choice_of_candidates() -> None:
    """A row's noise that depends on its neighbours would make `seed` mean nothing under load."""
    together = exponential_noise(noise_keys([5, 2**63 - 1, 5], [0, 7, 1]), ALL)
    assert torch.equal(together[1:2], exponential_noise(noise_keys([2**63 - 1], [7]), ALL))
    some = torch.tensor([[40_000, 3, 17]])
    assert torch.equal(exponential_noise(noise_keys([5], [1]), some)[0], together[2, some[0]])


def test_seeds_positions_and_tokens_give_unrelated_noise() -> None:
    """Correlated rows would make parallel samples of one prompt repeat each other."""
    rows = exponential_noise(noise_keys([0, 0, 1, 2**32, 2**32 + 1], [0, 1, 0, 0, 0]), ALL)
    correlations = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlations.abs().max() < 0.02
    neighbours = torch.corrcoef(torch.stack((rows[0, 1:], rows[0, :-1])))
    assert neighbours[0, 1].abs() < 0.02


def test_noise_is_exponential_down_to_its_small_values() -> None:
    """Small values decide who is sampled: coarse ones there would bias rare tokens."""
    noise = torch.cat([exponential_noise(noise_keys([seed], [0]), ALL)[0] for seed in range(40)]).double()
    assert noise.min() > 0
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(1.0, abs=0.005)
    for probability in (0.5, 0.1, 0.01, 1e-3, 1e-4):
        expected = probability * len(noise)
        found = int((noise < -torch.log1p(torch.tensor(-probability).double())).sum())
        assert abs(found - expected) < 5 * expected**0.5


@pytest.mark.parametrize("size", [5, 3000, 50_000])
def test_the_native_kernel_draws_with_the_same_noise(size: int) -> None:
    """A seed must mean the same on a machine that has no compiler."""
    if native_library() is None:
        pytest.skip("native kernels are not built or not for this CPU")
    logits = torch.randn(200, size, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 3] = -math.inf
    keys = noise_keys(range(200), [4] * 200)
    before = torch.get_num_threads()
    native, plain = (CpuDevice(use_native=use).draw(logits, keys) for use in (True, False))
    torch.set_num_threads(before)
    assert torch.equal(native, plain)
    assert len(set(native.tolist())) > min(size, 100) // 2
    assert 3 not in native
