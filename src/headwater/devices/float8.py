"""Keys and values in 8-bit floats: each token's head with a power of two of its own.

A power of two loses nothing: it moves the numbers to where an 8-bit float has all its bits, whatever their size, needs
no calibration, and depends on the token alone, so that a page's bytes do not depend on batches or chunks. The kernels
of triton_float8.py compute the same.
"""

import torch

# the largest number of a head comes to lie in [128, 256): far from the largest of float8_e4m3fn, 448
LARGEST_EXPONENT = 7
MIN_EXPONENT = -40  # of a head of zeros, too; kernels multiply with the reverse and must not overflow
_FLOAT32_BIAS, _FLOAT32_MANTISSA_BITS = 127, 23


def to_float8(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., D] -> values [..., D] of an 8-bit `dtype` and int8[...]: x is about values * 2 ** exponents."""
    wide = x.float()
    exponents = (wide.abs().amax(dim=-1).view(torch.int32) >> _FLOAT32_MANTISSA_BITS) - _FLOAT32_BIAS
    exponents = (exponents - LARGEST_EXPONENT).clamp_(min=MIN_EXPONENT)
    return (wide * power_of_two(-exponents)[..., None]).to(dtype), exponents.to(torch.int8)


def from_float8(values: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The reverse of `to_float8`, in `dtype`."""
    return (values.float() * power_of_two(exponents)[..., None]).to(dtype)


def power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """2 ** exponents, exactly, in float32, of integers in [-126, 127]."""
    return ((exponents.to(torch.int32) + _FLOAT32_BIAS) << _FLOAT32_MANTISSA_BITS).view(torch.float32)
