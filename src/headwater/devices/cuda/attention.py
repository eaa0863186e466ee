"""The attention of one step by our own Triton kernels: decodes and prompt chunks over paged KV.

The external chunks of a batch go to another backend's kernels.
"""

import torch

from headwater.devices.cuda.external_attention import ExternalAttention
from headwater.devices.cuda.kernels.decode import DecodeScratch, decode
from headwater.devices.cuda.kernels.gather import gather
from headwater.devices.cuda.kernels.layers import norm_columns, square_sums
from headwater.devices.cuda.kernels.prefill import PrefillScratch, prefill
from headwater.devices.cuda.kernels.rotary import write_prompt_kv
from headwater.devices.cuda.kernels.rows import Unscaled
from headwater.devices.cuda.paged_batch import ExternalChunks, PagedBatch
from headwater.devices.cuda.ranks.group import CudaRanks
from headwater.devices.device import AttentionGeometry
from headwater.devices.kv_memory import KVMemory


class TritonStepAttention:
    """device.StepAttention over a batch that lies on the device."""

    def __init__(
        self,
        geometry: AttentionGeometry,
        batch: PagedBatch,
        *,
        kv: KVMemory,
        scratch: DecodeScratch | None,
        prefill_scratch: PrefillScratch | None,
        external_attention: ExternalAttention | None = None,
        is_deterministic: bool = False,
        ranks: CudaRanks | None = None,
    ) -> None:
        """`ranks` is needed where they share the QK-norm."""
        assert not (is_deterministic and batch.num_decodes), "a decode is a chunk of one token then"
        assert scratch is not None or not batch.num_decodes
        assert prefill_scratch is not None or batch.chunks is None
        assert external_attention is not None or batch.chunks is None or batch.chunks.external is None
        self._geometry = geometry
        self._batch = batch
        self._kv = kv
        self._scratch = scratch
        self._prefill_scratch = prefill_scratch
        self._external_attention = external_attention
        self._is_deterministic = is_deterministic
        self._ranks = ranks

    @property
    def reads_unscaled(self) -> bool:
        """Whether the kernels multiply queries, keys and values by the scales of their product: those of decodes do."""
        return self._batch.chunks is None and not self._geometry.norms_whole

    def __call__(
        self,
        qkv: torch.Tensor | Unscaled,
        layer: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        shape, batch, kv = self._geometry, self._batch, self._kv
        scales = qkv.scales if isinstance(qkv, Unscaled) else None
        qkv = qkv.product if isinstance(qkv, Unscaled) else qkv
        assert scales is None or self.reads_unscaled
        if shape.norms_whole and q_norm is not None and k_norm is not None:
            self._norm_whole(qkv, (q_norm, k_norm))
            q_norm = k_norm = None
        out = torch.empty((len(qkv), shape.num_heads * shape.head_dim), dtype=qkv.dtype, device=qkv.device)
        if batch.num_decodes:
            assert self._scratch is not None
            decode(
                qkv,
                out,
                shape,
                batch,
                kv=kv,
                layer=layer,
                scratch=self._scratch,
                q_norm=q_norm,
                k_norm=k_norm,
                sinks=sinks,
                scales=scales,
            )
        if batch.chunks is not None:
            assert self._prefill_scratch is not None
            write_prompt_kv(qkv, shape, batch, kv=kv, layer=layer, q_norm=q_norm, k_norm=k_norm)
            if len(batch.chunks.tiles):
                prefill(
                    qkv,
                    out,
                    shape,
                    batch,
                    kv=kv,
                    layer=layer,
                    scratch=self._prefill_scratch,
                    masks_all=self._is_deterministic,
                    sinks=sinks,
                )
            if batch.chunks.external is not None:
                assert sinks is None, "geometries with sinks are refused by external backends"
                self._attend_external(qkv, out, layer, batch.chunks.external)
        return out

    def _norm_whole(self, qkv: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Norm queries and keys in place, each by all heads together: those of all ranks."""
        shape = self._geometry
        sizes = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        firsts, sums, nums = (0, sizes[0]), (None, None), (0, 0)
        if shape.shared_norm is not None:
            assert self._ranks is not None
            nums = shape.shared_norm.num_normed(shape)
            squares = square_sums(qkv, firsts, shape.shared_norm.num_counted(shape))
            sums = self._ranks.all_reduce(squares).unbind(1)
        for first, size, norm, some, num in zip(firsts, sizes, norms, sums, nums, strict=True):
            columns = qkv[:, first : first + size]
            norm_columns(columns, norm, shape.norm_eps, offset=shape.norm_offset, squares=some, num_normed=num)

    def _attend_external(self, qkv: torch.Tensor, out: torch.Tensor, layer: int, chunks: ExternalChunks) -> None:
        """Queries are rotated in place already, and keys and values are in their pages."""
        shape = self._geometry
        assert self._external_attention is not None
        heads = qkv[chunks.first_token :].unflatten(-1, (-1, shape.head_dim))
        q, k, v = heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
        if chunks.contexts is not None:
            gathered = gather(chunks.contexts, self._batch.tables, shape, kv=self._kv, layer=layer, dtype=qkv.dtype)
            k, v = gathered.unbind(1)
        to = out[chunks.first_token :].unflatten(-1, (shape.num_heads, shape.head_dim))
        self._external_attention.attend(q, k, v, to, chunks, scale=shape.scale)
