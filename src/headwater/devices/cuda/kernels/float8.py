"""8-bit keys and values inside Triton kernels: what float8.py does in PyTorch."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from headwater.devices.float8 import LARGEST_EXPONENT, MIN_EXPONENT

_LARGEST_EXPONENT = tl.constexpr(LARGEST_EXPONENT)
_MIN_EXPONENT = tl.constexpr(MIN_EXPONENT)


@triton.jit
def head_exponent(largest):
    """The exponent of heads whose largest number (float32, not negative) is given. int32"""
    return tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127 - _LARGEST_EXPONENT, _MIN_EXPONENT)


@triton.jit
def power_of_two(exponents):
    """2 ** exponents, exactly, of integers in [-126, 127]. float32"""
    return ((exponents.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_exponents(exponents, table, page_stride, keys, is_key, PAGE_SIZE: tl.constexpr, VALUES: tl.constexpr):
    """Of keys and values of a head of one layer, which `exponents` points to. Two of int8[keys], 0 where masked."""
    page = tl.load(table + keys // PAGE_SIZE, mask=is_key, other=0).to(tl.int64)
    at = exponents + page * page_stride + keys % PAGE_SIZE
    return tl.load(at, mask=is_key, other=0), tl.load(at + VALUES, mask=is_key, other=0)


@triton.jit
def split_pairs(pairs, dtype: tl.constexpr, wide: tl.constexpr):
    """int16 of two neighbouring 8-bit floats each -> the first ones and the second ones, as `wide`."""
    first = pairs.to(tl.int8).to(dtype, bitcast=True).to(wide)
    second = (pairs >> 8).to(tl.int8).to(dtype, bitcast=True).to(wide)
    return first, second
