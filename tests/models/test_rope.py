"""Rotary frequencies against transformers' own functions, in every kind."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from headwater.models.rope import RopeConfig

pytestmark = pytest.mark.slow

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.5},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 6.0,
     "original_max_position_embeddings": 512},
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 2048,
     "beta_fast": 24, "beta_slow": 2, "attention_factor": 0.9},
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 2048,
     "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
]  # fmt: skip


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda it: f"{it['rope_type']}-{it.get('factor', 1)}")
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_frequencies_are_transformers(scaling: dict[str, Any], head_dim: int) -> None:
    """A small error here shows only in long texts, so it is compared where it arises."""
    reference = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=head_dim, max_position_embeddings=4096, rope_parameters=dict(scaling))
    )
    rope = RopeConfig.from_hf({"rope_parameters": scaling}, max_position=4096)
    np.testing.assert_allclose(rope.inv_freq(head_dim), reference.inv_freq.numpy(), rtol=5e-6, atol=0)
    assert rope.attention_factor == pytest.approx(reference.attention_scaling)


@pytest.mark.parametrize("theta", [1e4, 1e5, 2.5e5, 5e5, 1e6, 1e7, 999.5])
def test_frequencies_are_those_that_pytorch_computed(theta: float) -> None:
    """Stores hold keys that were rotated with them: the last bit may differ, where PyTorch's power rounds wrongly."""
    for head_dim in (16, 64, 80, 128):
        found = RopeConfig(theta=theta).inv_freq(head_dim)
        before = (1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)).numpy()
        assert found.dtype == np.float32 and found.shape == (head_dim // 2,)
        np.testing.assert_array_max_ulp(found, before, maxulp=1)
        assert (found != before).sum() <= len(found) // 16
