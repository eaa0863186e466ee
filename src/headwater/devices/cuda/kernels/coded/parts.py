"""What the kernels over codes share."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.products.coded_matrix import CodedMatrix


@triton.jit
def byte_codes(codes, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """8-bit codes as numbers."""
    if FORMAT == "float8_e4m3fn":
        return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    return codes.to(dtype)


@triton.jit
def offset_of(scale, offsets, at, mask, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """What each input of a group is multiplied with, besides its code."""
    if HAS_OFFSETS:
        found = tl.load(offsets + at, mask=mask, other=0)
        if found.dtype == tl.int16:  # bfloat16's bits, the upper half of a float32: -128 - zero point
            offset = ((found.to(tl.int32) << 16).to(tl.float32, bitcast=True) + 128.0) * scale
        else:
            offset = found.to(tl.float32)
    else:
        offset = (-8.0 if FORMAT == "int4" else 0.0) * scale
    return offset


@triton.jit
def with_bias(total, row, biases, HAS_BIAS: tl.constexpr):
    """One output of a product, and its bias."""
    if HAS_BIAS:
        total += tl.load(biases + row).to(tl.float32)
    return total


@triton.jit
def put(total, row, is_in, y, ADDS: tl.constexpr):
    """Store one output, or add it."""
    if ADDS:
        total += tl.load(y + row).to(tl.float32)
    tl.store(y + row, total.to(y.dtype.element_ty), mask=is_in)


def offset_bits(matrix: CodedMatrix) -> torch.Tensor:
    """The offsets as `offset_of` loads them; of a matrix without offsets, anything."""
    if matrix.offsets is None:
        return matrix.scales
    return matrix.offsets.view(torch.int16) if matrix.has_zeros else matrix.offsets
