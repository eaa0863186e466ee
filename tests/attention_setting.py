"""A batch over random pages, and its attention by the definition: what the tests of attention share."""

import numpy as np
import torch

from headwater.devices.device import AttentionBatch, AttentionGeometry, Device
from headwater.devices.float8 import from_float8, to_float8
from headwater.devices.kv_memory import KVLayout, KVMemory

NUM_LAYERS = 2
# (queries, context with them) per row: decodes, whole prompts, later chunks, more than one block of keys and more than
# one tile of queries; Triton's interpreter takes its time for each token
MIXES = {
    "one decode": [(1, 1)],
    "decodes": [(1, 5), (1, 64), (1, 65), (1, 200), (1, 129)],
    "a whole prompt": [(70, 70)],
    "chunks and decodes": [(1, 33), (1, 150), (45, 200), (9, 9), (2, 66)],
}
# for tests that ask where something is read or written, not how it is computed
FEW_OF_EACH = [(1, 33), (1, 70), (20, 60), (2, 18)]


class Setting:
    """A batch over random pages; every token not of this step has random keys and values in its page."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        page_size: int = 16,
        geometry: tuple[int, int, int] = (6, 2, 64),
        has_norm: bool = False,
    ) -> None:
        self.generator = torch.Generator().manual_seed(1)
        num_heads, num_kv_heads, head_dim = geometry
        self.geometry = AttentionGeometry(num_heads, num_kv_heads, head_dim, norm_eps=1e-6)
        num_pages = [-(-context // page_size) for _, context in rows]
        ids = np.random.default_rng(2).permutation(sum(num_pages) + 3).astype(np.int32)
        self.tables = np.full((len(rows), max(num_pages) + 1), -1, dtype=np.int32)
        for row, num in enumerate(num_pages):
            self.tables[row, :num], ids = ids[:num], ids[num:]
        layout = KVLayout(NUM_LAYERS, num_kv_heads, head_dim, page_size, kv_dtype or dtype)
        self.kv = self._random_kv(layout, len(ids) + sum(num_pages))
        self.batch = AttentionBatch(
            query_starts=np.cumsum([0, *(queries for queries, _ in rows)], dtype=np.int32),
            context_lens=np.array([context for _, context in rows], dtype=np.int32),
            page_tables=self.tables,
            positions=np.concatenate([np.arange(n - q, n) for q, n in rows]).astype(np.int32),
        )
        num_tokens = len(self.batch.positions)
        self.qkv = self.random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
        angles = self.random(num_tokens, head_dim // 2) * 3
        self.cos, self.sin = angles.cos(), angles.sin()
        norm = [1 + 0.3 * self.random(head_dim) for _ in range(2)]
        self.norms = [it.to(dtype) for it in norm] if has_norm else [None, None]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def _random_kv(self, layout: KVLayout, num_pages: int) -> KVMemory:
        values = self.random(num_pages, *layout.page_shape)
        kv = KVMemory(layout, torch.zeros((num_pages, layout.page_bytes), dtype=torch.uint8))
        if kv.exponents is None:
            kv.pages.copy_(values)
        else:
            stored, exponents = to_float8(values, layout.dtype)
            kv.pages.copy_(stored)
            kv.exponents.copy_(exponents)
        return kv

    def run(self, device: Device, layer: int) -> torch.Tensor:
        place = device.torch_device
        kv = KVMemory(self.kv.layout, self.kv.memory.to(place))
        attention = device.plan_attention(
            self.geometry, self.batch, cos=self.cos.to(place), sin=self.sin.to(place), kv=kv
        )
        norms = [None if norm is None else norm.to(place) for norm in self.norms]
        found = attention(self.qkv.to(place, copy=True), layer, *norms).cpu()
        self.kv.memory.copy_(kv.memory)
        return found

    def tokens(self, row: int, layer: int, which: int) -> torch.Tensor:
        """All keys (0) or values (1) of a row. float32[context, heads, head_dim]"""
        used = self.tables[row][self.tables[row] >= 0]
        pages = self.kv.pages[used, layer, which]
        if self.kv.exponents is not None:
            pages = from_float8(pages, self.kv.exponents[used, layer, which], torch.float32)
        flat = pages.transpose(1, 2).flatten(0, 1)
        return flat[: int(self.batch.context_lens[row])].float()

    def rotated(self, x: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        x = x.float()
        if norm is not None:
            x = x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.float()
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        cos, sin = self.cos[:, None], self.sin[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def expected(self, layer: int) -> torch.Tensor:
        """Softmax attention by its definition, over what the pages hold after the step."""
        shape = self.geometry
        heads = self.qkv.view(len(self.qkv), -1, shape.head_dim)
        queries = self.rotated(heads[:, : shape.num_heads], self.norms[0])
        out = torch.empty(len(self.qkv), shape.num_heads, shape.head_dim)
        for row in range(len(self.batch.context_lens)):
            keys, values = self.tokens(row, layer, 0), self.tokens(row, layer, 1)
            start, end = self.batch.query_starts[row], self.batch.query_starts[row + 1]
            for token in range(start, end):
                visible = int(self.batch.positions[token]) + 1
                for head in range(shape.num_heads):
                    kv_head = head // (shape.num_heads // shape.num_kv_heads)
                    scores = keys[:visible, kv_head] @ queries[token, head] * shape.head_dim**-0.5
                    out[token, head] = scores.softmax(dim=0) @ values[:visible, kv_head]
        return out.flatten(1)
