"""Codes of 4 bits as 16-bit floats in registers, two at a time.

The compiler alone would take the halves of a word apart. The interpreter, and float32, have plain operations instead.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

from typing import Literal

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from headwater.devices.cuda.products.coded_matrix import CodedMatrix

Kind = Literal["middle", "zeros", "offsets"]  # what is taken from codes: 8, or zero points; or offsets are added


def kind_of(matrix: CodedMatrix) -> Kind:
    if matrix.offsets is None:
        return "middle"
    return "zeros" if matrix.has_zeros else "offsets"


def is_asm(dtype: torch.dtype) -> bool:
    """Whether kernels for such activations use a card's own instructions."""
    return dtype != torch.float32 and isinstance(low_codes, JITFunction)


@triton.jit
def low_codes(halves, dtype: tl.constexpr, IS_ASM: tl.constexpr):
    """The last 4 bits of each half of a word as 128 + n in bfloat16, 1024 + n in float16, or n.

    The compiler alone would take pairs of halves apart.
    """
    if not IS_ASM:
        numbers = (halves & 15).to(dtype)
    elif dtype == tl.bfloat16:
        numbers = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000f000f, 0x43004300, 0xea;", "=r,r", [halves], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        numbers = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x000f000f, 0x64006400, 0xea;", "=r,r", [halves], dtype=tl.float16, is_pure=True, pack=2
        )
    return numbers


@triton.jit
def next_codes(halves, IS_ASM: tl.constexpr):
    """What comes above: its last 4 bits are the next codes."""
    if not IS_ASM:
        above = halves >> 4
    else:
        above = tl.inline_asm_elementwise("shr.b32 $0, $1, 4;", "=r,r", [halves], dtype=tl.int16, is_pure=True, pack=2)
    return above


@triton.jit
def plus(numbers, value, dtype: tl.constexpr, IS_ASM: tl.constexpr):
    """Exact: integers of 8 bits in bfloat16, of 11 in float16."""
    if not IS_ASM:
        sums = numbers + value
    elif dtype == tl.bfloat16:
        sums = tl.inline_asm_elementwise(
            "{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2; }",
            "=r,r,r", [numbers, value], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        sums = tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [numbers, value], dtype=tl.float16, is_pure=True, pack=2
        )
    return sums


@triton.jit
def times(numbers, scale, dtype: tl.constexpr, IS_ASM: tl.constexpr):
    """Numbers [F, K] times float32[F], rounded once.

    As the sum of two bfloat16 numbers, the scale is exact: float16 has 11 bits.
    """
    high = scale.to(dtype)
    shape: tl.constexpr = numbers.shape
    if not IS_ASM:
        found = (numbers.to(tl.float32) * scale[:, None]).to(dtype)
    elif dtype == tl.bfloat16:
        low = (scale - high.to(tl.float32)).to(tl.bfloat16)
        found = tl.inline_asm_elementwise(
            "{ .reg .b32 t; mul.rn.bf16x2 t, $1, $3; fma.rn.bf16x2 $0, $1, $2, t; }",
            "=r,r,r,r", [numbers, tl.broadcast_to(high[:, None], shape), tl.broadcast_to(low[:, None], shape)],
            dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        found = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [numbers, tl.broadcast_to(high[:, None], shape)],
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return found


@triton.jit
def above(dtype: tl.constexpr, IS_ASM: tl.constexpr):
    """How much `low_codes` is above the codes."""
    value: tl.constexpr = (128.0 if dtype == tl.bfloat16 else 1024.0) if IS_ASM else 0.0
    return value


@triton.jit
def scale_of(bits):
    """float16 or float32, whose bits were loaded."""
    if bits.dtype == tl.int16:
        scale = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scale = bits.to(tl.float32, bitcast=True)
    return scale
