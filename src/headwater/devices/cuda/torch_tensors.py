"""The border between host tensors and PyTorch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from headwater.devices.host_tensor import STORAGE_TYPES, HostTensor, RandomTensor


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that has this name in PyTorch."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of PyTorch")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def place_tensor(weight: HostTensor | RandomTensor, *, dtype: str, device: torch.device) -> torch.Tensor:
    """A weight as a tensor of `dtype` on `device`; it shares the memory of `weight` where nothing changes."""
    tensor = _random(weight, device) if isinstance(weight, RandomTensor) else from_host(weight)
    return tensor.to(device=device, dtype=torch_dtype(dtype))


def from_host(tensor: HostTensor) -> torch.Tensor:
    """A tensor on the CPU that shares its memory; blocks become float32."""
    if tensor.has_blocks:
        return torch.from_numpy(tensor.to_float32())
    plain = torch.from_numpy(tensor.data)
    return plain if plain.dtype == torch_dtype(tensor.format) else plain.view(torch_dtype(tensor.format))


def to_host(tensor: torch.Tensor, *, max_rows: int | None = None) -> HostTensor:
    """The tensor, or its first rows, in host memory; it shares the memory of one that is there already."""
    tensor = tensor[:max_rows].detach().cpu().contiguous()
    name = dtype_name(tensor.dtype)
    storage = STORAGE_TYPES[name].name
    if name != storage:  # numpy has no such type
        tensor = tensor.view(torch_dtype(storage))
    return HostTensor(name, tuple(tensor.shape), tensor.numpy())


def _random(weight: RandomTensor, device: torch.device) -> torch.Tensor:
    """Made on a GPU if that is the place; host memory has the same numbers without PyTorch."""
    if device.type == "cpu":
        return from_host(weight.to_host())
    generator = torch.Generator(device).manual_seed(weight.seed)
    whole = torch.randn(weight.whole, generator=generator, device=device)
    return weight.of_whole(whole).mul(weight.scale) if weight.part or weight.ranges else whole.mul_(weight.scale)


def open_shared(handle: Sequence[Any]) -> torch.Tensor:
    """A tensor in GPU memory of another process of this host: shape, strides, offset, dtype, device, and what follows.

    These are arguments of PyTorch's `rebuild_cuda_tensor`. A device is a number, or a UUID as SGLang's trainers send.
    """
    shape, strides, offset, dtype, device, *more = handle
    return rebuild_cuda_tensor(
        torch.Tensor,
        torch.Size(shape),
        tuple(strides),
        offset,
        torch.UntypedStorage,
        torch_dtype(dtype),
        _device_index(device),
        *more,
    )


def _device_index(device: int | str) -> int:
    if isinstance(device, int):
        return device
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == device:
            return index
    raise ValueError(f"no GPU of this process has the UUID {device}")
