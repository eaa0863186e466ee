"""Sends a step's integers to the device: one pinned buffer, one copy, no waiting."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int32]

ALIGNMENT = 16  # ints: kernels are compiled for pointers of 16 bytes, and 64 suit the card's cache lines


class Fence:
    """A point in the device's queue of work. A CPU has no queue, and its fences are always passed."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        if self._event is not None:
            self._event.record()

    def is_passed(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Wait until it is passed; other Python threads run meanwhile."""
        if self._event is not None:
            self._event.synchronize()


def pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Host memory for asynchronous copies from and to `device`."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, complete once a fence that is recorded after this call is passed."""
    return pinned(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor, non_blocking=True)


class StagingRing:
    """Pinned buffers used in turn, and one buffer on the device, which the next `stage` overwrites.

    The address on the device stays the same as long as no call needs more than `num_ints`.
    """

    def __init__(self, device: torch.device, *, num_ints: int, num_buffers: int = 3) -> None:
        self._device = device
        self._next = 0
        self._fences = [Fence(device) for _ in range(num_buffers)]
        self._allocate(num_ints)

    def stage(self, arrays: Sequence[Ints]) -> list[torch.Tensor]:
        """Copy `arrays` to the device; returns them there, int32, valid until the next call."""
        starts = np.cumsum([0, *(-(-array.size // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
        if starts[-1] > self._host[0].numel():
            for fence in self._fences:
                fence.wait()
            self._allocate(2 * starts[-1])
        self._fences[self._next].wait()
        host = self._views[self._next]
        for start, array in zip(starts, arrays, strict=False):
            host[start : start + array.size] = array.reshape(-1)
        self.on_device[: starts[-1]].copy_(self._host[self._next][: starts[-1]], non_blocking=True)
        self._fences[self._next].record()
        self._next = (self._next + 1) % len(self._fences)
        return [
            self.on_device[start : start + array.size].view(array.shape)
            for start, array in zip(starts, arrays, strict=False)
        ]

    def _allocate(self, num_ints: int) -> None:
        self._host = [pinned((num_ints,), torch.int32, self._device) for _ in self._fences]
        self._views = [buffer.numpy() for buffer in self._host]
        self.on_device = torch.zeros(num_ints, dtype=torch.int32, device=self._device)
