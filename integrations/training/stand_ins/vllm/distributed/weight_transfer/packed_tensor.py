"""Tensors joined in pieces: a piece ends with the tensor that takes it over its size, as the server expects."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

PIECE_BYTES = 1 << 30


def packed_nccl_broadcast_producer(
    iterator: Iterator[Any],
    group: Any,
    src: int,
    post_iter_func: Callable[[Any], torch.Tensor],
    buffer_size_bytes: int = PIECE_BYTES,
) -> None:
    """Broadcast the tensors of `iterator` as bytes."""
    waiting: list[torch.Tensor] = []
    num_bytes = 0
    for item in iterator:
        waiting.append(post_iter_func(item).detach().contiguous().view(-1).view(torch.uint8))
        num_bytes += waiting[-1].numel()
        if num_bytes > buffer_size_bytes:
            group.broadcast(torch.cat(waiting), src)
            waiting, num_bytes = [], 0
    if waiting:
        group.broadcast(torch.cat(waiting), src)
