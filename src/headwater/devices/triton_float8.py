"""8-bit keys and values inside Triton kernels: what float8.py does in PyTorch."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from headwater.devices.float8 import LARGEST_EXPONENT

_LARGEST_EXPONENT = tl.constexpr(LARGEST_EXPONENT)


@triton.jit
def head_exponent(largest):
    """The exponent of heads whose largest number (float32, not negative) is given. int32"""
    return tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127 - _LARGEST_EXPONENT, -126)


@triton.jit
def power_of_two(exponents):
    """2 ** exponents, exactly, of integers in [-126, 127]. float32"""
    return ((exponents.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
