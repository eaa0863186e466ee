"""Copies of a rank's heads between its KV memory and host memory of whole pages."""

import numpy as np
import numpy.typing as npt
import torch

from headwater.devices.cpu.ranks.page_share import PageShare
from headwater.devices.cuda.kernels.head_copy import copy_heads
from headwater.devices.kv_memory import KVLayout

Pages = npt.NDArray[np.int32]
ALL_LAYERS = slice(None)


class HeadCopies:
    """Enqueues copies on the current stream. `host` is uint8[pages, bytes of a whole page], mapped for the GPU."""

    def __init__(self, share: PageShare, host: npt.NDArray[np.uint8]) -> None:
        self._share = share
        num_heads = share.own.num_kv_heads
        self._host = heads_of(torch.from_numpy(host), share.whole, first_head=share.first_head, num_heads=num_heads)

    def offload(self, memory: torch.Tensor, device_pages: Pages, host_pages: Pages) -> None:
        """`memory`: this rank's KV memory. Nothing where another rank writes the same heads."""
        if self._share.is_writer:
            self._copy(self._own(memory), device_pages, self._host, host_pages, device=memory.device)

    def restore(
        self, host_pages: Pages, memory: torch.Tensor, device_pages: Pages, *, layers: slice = ALL_LAYERS
    ) -> None:
        host, own = ([part[:, layers] for part in parts] for parts in (self._host, self._own(memory)))
        self._copy(host, host_pages, own, device_pages, device=memory.device)

    def _own(self, memory: torch.Tensor) -> list[torch.Tensor]:
        own = self._share.own
        return heads_of(memory, own, first_head=0, num_heads=own.num_kv_heads)

    def _copy(
        self,
        source: list[torch.Tensor],
        sources: Pages,
        target: list[torch.Tensor],
        targets: Pages,
        *,
        device: torch.device,
    ) -> None:
        lists = torch.empty((2, len(sources)), dtype=torch.int32, pin_memory=device.type == "cuda")
        lists.numpy()[:] = sources, targets
        on_device = lists.to(device, non_blocking=True)  # PyTorch keeps both until the stream is done with them
        for part, of in zip(source, target, strict=True):
            copy_heads(part, on_device[0], of, on_device[1])


def heads_of(memory: torch.Tensor, layout: KVLayout, *, first_head: int, num_heads: int) -> list[torch.Tensor]:
    """Views of uint8[num_pages, page_bytes], each uint8[num_pages, num_layers, 2 (K, V), bytes of the heads].

    Of the values, then of the exponents if there are any.
    """
    layers = memory.view(-1, layout.num_layers, layout.layer_bytes)
    spans = [(0, layout.value_bytes)]
    if layout.is_scaled:
        spans.append((layout.value_bytes, layout.value_bytes + layout.num_exponents))
    found = []
    for start, stop in spans:
        heads = layers[:, :, start:stop].unflatten(-1, (2, layout.num_kv_heads, -1))
        found.append(heads[..., first_head : first_head + num_heads, :].flatten(-2))
    return found
