"""devices/float8.py in PyTorch."""

import torch

from headwater.devices.float8 import LARGEST_EXPONENT, MIN_EXPONENT

_FLOAT32_BIAS, _FLOAT32_MANTISSA_BITS = 127, 23


def to_float8(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] -> values [..., D] of an 8-bit `dtype` and exponents int8[...]: x is about values * 2 ** exponents."""
    wide = x.float()
    exponents = (wide.abs().amax(dim=-1).view(torch.int32) >> _FLOAT32_MANTISSA_BITS) - _FLOAT32_BIAS
    exponents = (exponents - LARGEST_EXPONENT).clamp_(min=MIN_EXPONENT)
    return (wide * power_of_two(-exponents)[..., None]).to(dtype), exponents.to(torch.int8)


def from_float8(values: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `to_float8`, in `dtype`."""
    return (values.float() * power_of_two(exponents)[..., None]).to(dtype)


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** exponents, exactly, in float32, of integers in [-126, 127]."""
    return ((exponents.to(torch.int32) + _FLOAT32_BIAS) << _FLOAT32_MANTISSA_BITS).view(torch.float32)
