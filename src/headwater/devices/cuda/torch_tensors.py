"""The border between host tensors and PyTorch."""

import torch

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
    return whole[weight.part].mul(weight.scale) if weight.part else whole.mul_(weight.scale)
