"""One token times a coded matrix: each code is read once, at the memory's speed, and multiplied without tensor cores.

A code of 4 bits is 1 + n / 16: its bits are the highest ones of a float32's fraction.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.coded.parts import byte_codes, offset_bits, offset_of, put, with_bias
from headwater.devices.cuda.products.coded_matrix import CodedMatrix

_ONE_TOKEN_FEATURES = 4  # of a program; the kernel spells them out
_ONE_TOKEN_WORDS, _ONE_TOKEN_CODES = 512, 1024  # of each output, at a time


def one_token(x: torch.Tensor, matrix: CodedMatrix, bias: torch.Tensor | None, y: torch.Tensor, *, adds: bool) -> None:
    """y = x W^T + b, or y += x W^T + b. [1, in] -> [1, out]"""
    num_features, width = matrix.shape
    is_int4 = matrix.format == "int4"
    num_lanes = width // 8 if is_int4 else width
    most = _ONE_TOKEN_WORDS if is_int4 else _ONE_TOKEN_CODES
    lanes = min(most, triton.next_power_of_2(num_lanes))
    _one_token_kernel[(triton.cdiv(num_features, _ONE_TOKEN_FEATURES),)](
        x,
        matrix.codes,
        matrix.scales,
        offset_bits(matrix),
        matrix.scales if bias is None else bias,
        y,
        width,
        num_features,
        *matrix.scales.stride(),
        GROUP=matrix.group,
        INNER=max(1, matrix.words),
        BLOCK=matrix.block,
        LANES=lanes,
        FORMAT=matrix.format,
        WHOLE=not is_int4 and matrix.num_groups == 1,
        HAS_OFFSETS=matrix.offsets is not None,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        num_warps=4 if lanes >= 512 else 2,
    )


@triton.jit
def _number(words, i: tl.constexpr):
    """Code i of each word: 1 + n / 16, as float32."""
    if i < 5:
        bits = words << (19 - 4 * i)
    else:
        bits = words >> (4 * i - 19)
    return ((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _pair(x, at, mask):
    """Two inputs side by side, as float32; those of bfloat16 are the halves of a word."""
    if x.dtype.element_ty == tl.bfloat16:
        words = tl.load((x + at).to(tl.pointer_type(tl.int32)), mask=mask, other=0)
        return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    lower = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    return lower, tl.load(x + at + 1, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _in_group(products, totals, scales, offsets, at, mask, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """Part of a sum: of `_number` times inputs, and of the inputs, within a group."""
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    offset = offset_of(scale, offsets, at, mask, FORMAT, HAS_OFFSETS)
    return (16.0 * scale) * (products - totals) + offset * totals


@triton.jit
def _scaled_code(
    code, value, scales, offsets, at, mask, FORMAT: tl.constexpr, WHOLE: tl.constexpr, HAS_OFFSETS: tl.constexpr
):
    """Part of a sum over 8-bit codes; one scale for all inputs of an output is left to the end."""
    product = byte_codes(code, FORMAT, tl.float32) * value
    if WHOLE:
        return product
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_OFFSETS:
        return product * scale + offset_of(scale, offsets, at, mask, FORMAT, HAS_OFFSETS) * value
    return product * scale


@triton.jit
def _put_sum(
    sums, totals, row, is_in, scales, offsets, biases, y,
    FORMAT: tl.constexpr, WHOLE: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """One output from the sums of its lanes."""
    total = tl.sum(sums, 0)
    if WHOLE:
        total *= tl.load(scales + row).to(tl.float32)
        if HAS_OFFSETS:
            total += tl.load(offsets + row).to(tl.float32) * tl.sum(totals, 0)
    put(with_bias(total, row, biases, HAS_BIAS), row, is_in, y, ADDS)


@triton.jit
def _one_token_kernel(
    x,
    codes,
    scales,
    offsets,
    biases,
    y,
    width,
    num_features,
    scale_row,
    scale_group,
    GROUP: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    FORMAT: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
):
    # four outputs, whose codes share the inputs in registers; those behind the last one repeat it
    first_row = tl.program_id(0) * 4
    last = num_features - 1
    row0 = first_row.to(tl.int64)
    row1, row2 = tl.minimum(first_row + 1, last).to(tl.int64), tl.minimum(first_row + 2, last).to(tl.int64)
    row3 = tl.minimum(first_row + 3, last).to(tl.int64)
    lanes = tl.arange(0, LANES)
    zeros = tl.zeros((LANES,), tl.float32)
    sums0, sums1, sums2, sums3 = zeros, zeros, zeros, zeros
    all_totals = zeros
    if FORMAT == "int4":
        SPAN: tl.constexpr = 8 * INNER  # inputs of a chunk of words
        PARTS: tl.constexpr = SPAN // GROUP if GROUP < SPAN else 1  # groups of a chunk
        RUNS: tl.constexpr = 4 // PARTS  # of inputs, in a part
        num_words = width // 8
        line0 = row0 // BLOCK * BLOCK * num_words + row0 % BLOCK * INNER
        line1 = row1 // BLOCK * BLOCK * num_words + row1 % BLOCK * INNER
        line2 = row2 // BLOCK * BLOCK * num_words + row2 % BLOCK * INNER
        line3 = row3 // BLOCK * BLOCK * num_words + row3 % BLOCK * INNER
        for first in range(0, num_words, LANES):
            lane = first + lanes
            is_in = lane < num_words
            chunk = lane // INNER
            place = chunk * (BLOCK * INNER) + lane % INNER
            # read once and never again: what other kernels need stays in the cache
            words0 = tl.load(codes + line0 + place, mask=is_in, other=0, eviction_policy="evict_first")
            words1 = tl.load(codes + line1 + place, mask=is_in, other=0, eviction_policy="evict_first")
            words2 = tl.load(codes + line2 + place, mask=is_in, other=0, eviction_policy="evict_first")
            words3 = tl.load(codes + line3 + place, mask=is_in, other=0, eviction_policy="evict_first")
            column = chunk * SPAN + 2 * (lane % INNER)
            for part in tl.static_range(PARTS):
                totals, products0, products1, products2, products3 = zeros, zeros, zeros, zeros, zeros
                for step in tl.static_range(RUNS):
                    i = part * RUNS + step
                    lower, upper = _pair(x, column + i * 2 * INNER, is_in)
                    products0 += _number(words0, i) * lower + _number(words0, i + 4) * upper
                    products1 += _number(words1, i) * lower + _number(words1, i + 4) * upper
                    products2 += _number(words2, i) * lower + _number(words2, i + 4) * upper
                    products3 += _number(words3, i) * lower + _number(words3, i + 4) * upper
                    totals += lower + upper
                at = chunk * PARTS + part if GROUP < SPAN else chunk * SPAN // GROUP
                at *= scale_group
                at0, at1, at2 = row0 * scale_row + at, row1 * scale_row + at, row2 * scale_row + at
                at3 = row3 * scale_row + at
                sums0 += _in_group(products0, totals, scales, offsets, at0, is_in, FORMAT, HAS_OFFSETS)
                sums1 += _in_group(products1, totals, scales, offsets, at1, is_in, FORMAT, HAS_OFFSETS)
                sums2 += _in_group(products2, totals, scales, offsets, at2, is_in, FORMAT, HAS_OFFSETS)
                sums3 += _in_group(products3, totals, scales, offsets, at3, is_in, FORMAT, HAS_OFFSETS)
    else:
        for first in range(0, width, LANES):
            lane = first + lanes
            is_in = lane < width
            code0 = tl.load(codes + row0 * width + lane, mask=is_in, other=0, eviction_policy="evict_first")
            code1 = tl.load(codes + row1 * width + lane, mask=is_in, other=0, eviction_policy="evict_first")
            code2 = tl.load(codes + row2 * width + lane, mask=is_in, other=0, eviction_policy="evict_first")
            code3 = tl.load(codes + row3 * width + lane, mask=is_in, other=0, eviction_policy="evict_first")
            value = tl.load(x + lane, mask=is_in, other=0.0).to(tl.float32)
            at = lane // GROUP * scale_group
            at0, at1, at2 = row0 * scale_row + at, row1 * scale_row + at, row2 * scale_row + at
            at3 = row3 * scale_row + at
            sums0 += _scaled_code(code0, value, scales, offsets, at0, is_in, FORMAT, WHOLE, HAS_OFFSETS)
            sums1 += _scaled_code(code1, value, scales, offsets, at1, is_in, FORMAT, WHOLE, HAS_OFFSETS)
            sums2 += _scaled_code(code2, value, scales, offsets, at2, is_in, FORMAT, WHOLE, HAS_OFFSETS)
            sums3 += _scaled_code(code3, value, scales, offsets, at3, is_in, FORMAT, WHOLE, HAS_OFFSETS)
            if WHOLE and HAS_OFFSETS:
                all_totals += value
    _put_sum(sums0, all_totals, row0, True, scales, offsets, biases, y, FORMAT, WHOLE, HAS_OFFSETS, HAS_BIAS, ADDS)
    is_in = first_row + 1 <= last
    _put_sum(sums1, all_totals, row1, is_in, scales, offsets, biases, y, FORMAT, WHOLE, HAS_OFFSETS, HAS_BIAS, ADDS)
    is_in = first_row + 2 <= last
    _put_sum(sums2, all_totals, row2, is_in, scales, offsets, biases, y, FORMAT, WHOLE, HAS_OFFSETS, HAS_BIAS, ADDS)
    is_in = first_row + 3 <= last
    _put_sum(sums3, all_totals, row3, is_in, scales, offsets, biases, y, FORMAT, WHOLE, HAS_OFFSETS, HAS_BIAS, ADDS)
