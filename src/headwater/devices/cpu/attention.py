"""Paged attention in plain PyTorch: gather the pages of similar rows, then one batched attention call.

Decodes are grouped by the power of two of their context, so that one long request does not pad all others. Each
prefill chunk is a group of its own. The groups are made once per step, not per layer. Shape letters as in device.py;
L is the padded number of cached tokens of a group, Q the queries per row.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from headwater.devices.cuda.float8 import from_float8, to_float8
from headwater.devices.cuda.kv_memory import CudaKVMemory
from headwater.devices.device import AttentionBatch, AttentionGeometry


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that attend in one call."""

    tokens: torch.Tensor  # int64[rows * Q] into the step's tokens
    num_rows: int
    num_queries: int  # Q, the same for each of the rows
    pages: torch.Tensor  # int64[rows, pages of the longest]
    mask: torch.Tensor  # bool[rows, 1, H/G * Q, L], True: attend
    hidden_keys: torch.Tensor  # bool[rows, 1, L, 1], True: beyond the row's context


class TorchStepAttention:
    """The attention of one step (device.StepAttention)."""

    def __init__(
        self,
        geometry: AttentionGeometry,
        batch: AttentionBatch,
        *,
        kv: CudaKVMemory,
    ) -> None:
        self._geometry = geometry
        self._kv = kv
        self._cos, self._sin = batch.cos[:, None], batch.sin[:, None]
        page_size = kv.layout.page_size
        rows = np.repeat(np.arange(len(batch.context_lens)), batch.query_lens)
        self._write_pages = torch.from_numpy(batch.page_tables[rows, batch.positions // page_size].astype(np.int64))
        self._write_offsets = torch.from_numpy((batch.positions % page_size).astype(np.int64))
        self._groups = [self._group(batch, members) for members in _like_rows(batch)]

    def __call__(
        self, qkv: torch.Tensor, layer: int, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None
    ) -> torch.Tensor:
        shape = self._geometry
        heads = qkv.view(len(qkv), shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
        q, k, v = heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
        q, k = self._norm_and_rotate(q, q_norm), self._norm_and_rotate(k, k_norm)
        self._write(k, layer, 0)
        self._write(v, layer, 1)
        out = torch.empty_like(q)
        for group in self._groups:
            out[group.tokens] = self._attend(group, q[group.tokens], layer)
        return out.view(len(qkv), -1)

    def _norm_and_rotate(self, x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        if norm is not None:
            # The norm's output is rounded to the compute dtype, as in training.
            wide = F.rms_norm(wide, wide.shape[-1:], norm.float(), self._geometry.norm_eps).to(x.dtype).float()
        first, second = wide.chunk(2, dim=-1)
        cos, sin = self._cos, self._sin
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    def _attend(self, group: _Group, q: torch.Tensor, layer: int) -> torch.Tensor:
        """[rows * Q, H, D] -> the same. The query heads of one KV head become queries of one attention."""
        shape = self._geometry
        per_kv = shape.num_heads // shape.num_kv_heads
        rows, queries = group.num_rows, group.num_queries
        q = q.view(rows, queries, shape.num_kv_heads, per_kv, shape.head_dim)
        q = q.permute(0, 2, 3, 1, 4).reshape(rows, shape.num_kv_heads, per_kv * queries, shape.head_dim)
        # Masked tokens still count as 0 * value and score - infinity, and a page used before may hold NaN.
        k = self._gather(group, layer, 0).to(q.dtype).masked_fill_(group.hidden_keys, 0)
        v = self._gather(group, layer, 1).to(q.dtype).masked_fill_(group.hidden_keys, 0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)
        out = out.view(rows, shape.num_kv_heads, per_kv, queries, shape.head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(rows * queries, shape.num_heads, shape.head_dim)

    def _write(self, x: torch.Tensor, layer: int, which: int) -> None:
        """Store the step's keys (0) or values (1), [T, G, D]."""
        place = (self._write_pages, layer, which, slice(None), self._write_offsets)
        if self._kv.exponents is not None:
            x, self._kv.exponents[place] = to_float8(x, self._kv.pages.dtype)
        self._kv.pages[place] = x

    def _gather(self, group: _Group, layer: int, which: int) -> torch.Tensor:
        """A copy of the group's keys (0) or values (1), 8-bit floats as float32. [rows, G, L, D]"""
        pages = self._kv.pages[:, layer, which][group.pages]  # [rows, pages, G, page_size, D]
        if self._kv.exponents is not None:
            pages = from_float8(pages, self._kv.exponents[:, layer, which][group.pages], torch.float32)
        return pages.transpose(1, 2).reshape(group.num_rows, pages.shape[2], -1, pages.shape[4])

    def _group(self, batch: AttentionBatch, members: np.ndarray) -> _Group:
        page_size = self._kv.layout.page_size
        context_lens = batch.context_lens[members]
        num_queries = int(batch.query_lens[members[0]])
        num_pages = -(-int(context_lens.max()) // page_size)
        tokens = batch.query_starts[members][:, None] + np.arange(num_queries)  # [rows, Q]
        keys = np.arange(num_pages * page_size)
        mask = keys <= batch.positions[tokens][..., None]  # [rows, Q, L]
        per_kv = self._geometry.num_heads // self._geometry.num_kv_heads
        hidden = keys >= context_lens[:, None]
        return _Group(
            tokens=torch.from_numpy(tokens.reshape(-1).astype(np.int64)),
            num_rows=len(members),
            num_queries=num_queries,
            pages=torch.from_numpy(batch.page_tables[members, :num_pages].astype(np.int64)),
            mask=torch.from_numpy(np.tile(mask, (1, per_kv, 1)))[:, None],
            hidden_keys=torch.from_numpy(hidden)[:, None, :, None],
        )


def _like_rows(batch: AttentionBatch) -> list[np.ndarray]:
    """Row numbers grouped: single tokens by the power of two of their context, chunks one by one."""
    query_lens = batch.query_lens
    is_single = query_lens == 1
    groups = [np.array([row]) for row in np.flatnonzero(~is_single)]
    singles = np.flatnonzero(is_single)
    powers = np.ceil(np.log2(batch.context_lens[singles]))
    groups.extend(singles[powers == power] for power in np.unique(powers))
    return groups
