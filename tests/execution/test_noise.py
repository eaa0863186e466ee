"""The sampling noise: a pure function of (seed, position, token), and really exponential."""

import pytest
import torch

from headwater.execution.noise import exponential_noise

pytestmark = pytest.mark.slow

ALL = torch.arange(50_000)[None]


def test_noise_is_the_same_in_any_batch_and_any_choice_of_candidates() -> None:
    """A row's noise that depends on its neighbours would make `seed` mean nothing under load."""
    together = exponential_noise([5, 2**63 - 1, 5], [0, 7, 1], token_ids=ALL)
    assert torch.equal(together[1:2], exponential_noise([2**63 - 1], [7], token_ids=ALL))
    some = torch.tensor([[40_000, 3, 17]])
    assert torch.equal(exponential_noise([5], [1], token_ids=some)[0], together[2, some[0]])


def test_seeds_positions_and_tokens_give_unrelated_noise() -> None:
    """Correlated rows would make parallel samples of one prompt repeat each other."""
    rows = exponential_noise([0, 0, 1, 2**32, 2**32 + 1], [0, 1, 0, 0, 0], token_ids=ALL)
    correlations = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlations.abs().max() < 0.02
    neighbours = torch.corrcoef(torch.stack((rows[0, 1:], rows[0, :-1])))
    assert neighbours[0, 1].abs() < 0.02


def test_noise_is_exponential_down_to_its_small_values() -> None:
    """Small values decide who is sampled: coarse ones there would bias rare tokens."""
    noise = torch.cat([exponential_noise([seed], [0], token_ids=ALL)[0] for seed in range(40)]).double()
    assert noise.min() > 0
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(1.0, abs=0.005)
    for probability in (0.5, 0.1, 0.01, 1e-3, 1e-4):
        expected = probability * len(noise)
        found = int((noise < -torch.log1p(torch.tensor(-probability).double())).sum())
        assert abs(found - expected) < 5 * expected**0.5
