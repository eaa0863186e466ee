"""KV memory as a tensor."""

import torch

from headwater.devices.kv_memory import KVLayout


class CudaKVMemory:
    """Pages of one layout (devices.kv_memory.KVMemory), on the device of `memory`.

    `memory` may come in any shape and dtype, contiguous; it is kept as uint8[num_pages, page_bytes]. `pages` and
    `exponents` have the strides of the memory.
    """

    def __init__(self, layout: KVLayout, memory: torch.Tensor) -> None:
        assert memory.is_contiguous() and memory.nbytes % layout.page_bytes == 0
        self.layout = layout
        self.memory = memory.view(-1).view(torch.uint8).view(-1, layout.page_bytes)
        layers = self.memory.view(-1, layout.num_layers, layout.layer_bytes)
        end = layout.value_bytes
        self.pages = layers[..., :end].view(getattr(torch, layout.dtype)).unflatten(-1, layout.page_shape[1:])
        self.exponents: torch.Tensor | None = None
        if layout.is_scaled:
            exponents = layers[..., end : end + layout.num_exponents].view(torch.int8)
            self.exponents = exponents.unflatten(-1, layout.page_shape[1:-1])

    @property
    def num_pages(self) -> int:
        return self.memory.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.memory.nbytes
