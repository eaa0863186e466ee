"""The attention of one step by our own Triton kernels: decodes and prompt chunks over paged KV."""

import torch

from headwater.devices.device import AttentionGeometry
from headwater.devices.kv_memory import KVMemory
from headwater.devices.paged_batch import PagedBatch
from headwater.devices.triton_decode import DecodeScratch, decode
from headwater.devices.triton_prefill import PrefillScratch, prefill
from headwater.devices.triton_rotary import write_prompt_kv


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
    ) -> None:
        assert scratch is not None or not batch.num_decodes
        assert prefill_scratch is not None or batch.chunks is None
        self._geometry = geometry
        self._batch = batch
        self._kv = kv
        self._scratch = scratch
        self._prefill_scratch = prefill_scratch

    def __call__(
        self, qkv: torch.Tensor, layer: int, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None
    ) -> torch.Tensor:
        shape, batch, kv = self._geometry, self._batch, self._kv
        out = torch.empty((len(qkv), shape.num_heads * shape.head_dim), dtype=qkv.dtype, device=qkv.device)
        if batch.num_decodes:
            assert self._scratch is not None
            decode(
                qkv, out, shape, batch, kv=kv, layer=layer, scratch=self._scratch, q_norm=q_norm, k_norm=k_norm
            )
        if batch.chunks is not None:
            assert self._prefill_scratch is not None
            write_prompt_kv(qkv, shape, batch, kv=kv, layer=layer, q_norm=q_norm, k_norm=k_norm)
            prefill(qkv, out, shape, batch, kv=kv, layer=layer, scratch=self._prefill_scratch)
        return out
