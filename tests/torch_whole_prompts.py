"""A second implementation of WholePromptAttention, in PyTorch, which takes the place of packages for GPUs."""

import itertools

import torch
import torch.nn.functional as F

from headwater.devices.device import AttentionGeometry
from headwater.devices.paged_batch import WholePrompts


class TorchWholePrompts:
    """The protocol by its definition. `seen`: lengths of the prompts of each call."""

    name = "torch"

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def refusal(self, geometry: AttentionGeometry, dtype: torch.dtype) -> str | None:
        return None

    def attend(
        self, qkv: torch.Tensor, out: torch.Tensor, geometry: AttentionGeometry, prompts: WholePrompts
    ) -> None:
        starts = prompts.starts.tolist()
        self.seen.append([end - start for start, end in itertools.pairwise(starts)])
        assert prompts.longest == max(self.seen[-1])
        sizes = (geometry.num_heads, geometry.num_kv_heads, geometry.num_kv_heads)
        for start, end in itertools.pairwise(starts):
            rows = slice(prompts.first_token + start, prompts.first_token + end)
            q, k, v = qkv[rows].unflatten(-1, (-1, geometry.head_dim)).transpose(0, 1).split(sizes)
            found = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
            out[rows] = found[0].transpose(0, 1).flatten(1)
