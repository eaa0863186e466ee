"""A second implementation of ExternalAttention, in PyTorch, which takes the place of packages for GPUs."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from headwater.devices.cuda.paged_batch import ExternalChunks
from headwater.devices.device import AttentionGeometry


class TorchExternalAttention:
    """The protocol by its definition. `seen`: (queries, context) of the chunks of each call."""

    name = "torch"

    def __init__(self) -> None:
        self.seen: list[list[tuple[int, int]]] = []

    def refusal(self, geometry: AttentionGeometry, dtype: torch.dtype) -> str | None:
        return None

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        chunks: ExternalChunks,
        *,
        scale: float,
    ) -> None:
        starts = chunks.starts.tolist()
        keys = starts if chunks.contexts is None else chunks.contexts.starts.tolist()
        self.seen.append([(b - a, d - c) for (a, b), (c, d) in zip(pairwise(starts), pairwise(keys), strict=True)])
        assert chunks.longest == max(num for num, _ in self.seen[-1])
        if chunks.contexts is not None:
            assert chunks.contexts.longest == max(num for _, num in self.seen[-1])
        for (start, end), (first, last) in zip(pairwise(starts), pairwise(keys), strict=True):
            visible = torch.arange(first, last)[None] - first <= torch.arange(start, end)[:, None] - end + last - first
            found = F.scaled_dot_product_attention(
                q[start:end].transpose(0, 1)[None],
                k[first:last].transpose(0, 1)[None],
                v[first:last].transpose(0, 1)[None],
                attn_mask=visible.to(q.device),
                scale=scale,
                enable_gqa=True,
            )
            out[start:end] = found[0].transpose(0, 1)
