"""Products with weights that stay codes of 4 or 8 bits: one token, tiles of some tokens, and back to plain numbers.

A number is code * scale + offset, with a scale for each group of inputs of an output. A product is a sum of codes times
inputs within each group, in float32, then times the scale; codes are exact in every dtype. The sum of a group's inputs
takes the offset, or the 8 that codes of 4 bits are above their number.

One token reads each code once, at the memory's speed, with ordinary multiplications. For them a code becomes a float by
its bits: 1 + n / 16 has n in the highest bits of its fraction (the idea of bits that are a number at once: Kim et al.,
arXiv 2211.10017).
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.coded_matrix import CodedMatrix

MAX_TILE_TOKENS = 128  # above, plain numbers in a library's product are the faster way
_TILE_TOKENS = (16, 32, 64)
_ONE_TOKEN_FEATURES = 4  # of a program; the kernel spells them out
_ONE_TOKEN_WORDS, _ONE_TOKEN_CODES = 512, 1024  # of each output, at a time
_MIN_TILE = 16  # inputs of a product in tiles, at least


def has_tiles(matrix: CodedMatrix) -> bool:
    """Whether its codes can be multiplied in tiles: not those of 4 bits in short chunks."""
    return matrix.words >= _MIN_TILE or matrix.format != "int4"


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
        matrix.scales if matrix.offsets is None else matrix.offsets,
        matrix.scales if bias is None else bias,
        y,
        width,
        num_features,
        matrix.num_groups,
        GROUP=matrix.group,
        INNER=max(1, matrix.words),
        LANES=lanes,
        FORMAT=matrix.format,
        WHOLE=not is_int4 and matrix.num_groups == 1,
        HAS_OFFSETS=matrix.offsets is not None,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        num_warps=4 if lanes >= 512 else 2,
    )


def tiles(x: torch.Tensor, matrix: CodedMatrix, bias: torch.Tensor | None, y: torch.Tensor, *, adds: bool) -> None:
    """y = x W^T + b, or y += x W^T + b. [T, in] -> [T, out], whose rows may be parts of longer ones."""
    num_tokens, (num_features, width) = len(x), matrix.shape
    tokens = next((size for size in _TILE_TOKENS if num_tokens <= size), _TILE_TOKENS[-1])
    features = 64
    is_float32 = x.dtype == torch.float32
    inner = matrix.words if matrix.format == "int4" else matrix.inner
    _tiles_kernel[(triton.cdiv(num_features, features), triton.cdiv(num_tokens, tokens))](
        x,
        matrix.codes,
        matrix.scales,
        matrix.scales if matrix.offsets is None else matrix.offsets,
        matrix.scales if bias is None else bias,
        y,
        num_tokens,
        width,
        num_features,
        matrix.num_groups,
        y.stride(0),
        GROUP=matrix.group,
        INNER=inner,
        TOKENS=tokens,
        FEATURES=features,
        FORMAT=matrix.format,
        HAS_OFFSETS=matrix.offsets is not None,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        num_warps=4,
        num_stages=2 if is_float32 else 4,
    )


def to_numbers(matrix: CodedMatrix, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix as plain numbers, or those rows of it: [out, in]."""
    num_rows = matrix.shape[0] if rows is None else len(rows)
    out = torch.empty((num_rows, matrix.shape[1]), dtype=dtype, device=matrix.codes.device)
    if not num_rows:
        return out
    inner = matrix.words if matrix.format == "int4" else matrix.inner
    per_part = 8 if matrix.format == "int4" else 1
    chunks = max(1, 512 // inner)
    columns = triton.cdiv(matrix.shape[1], chunks * inner * per_part)
    _numbers_kernel[(num_rows, columns)](
        matrix.codes,
        matrix.scales,
        matrix.scales if matrix.offsets is None else matrix.offsets,
        out if rows is None else rows,
        out,
        matrix.shape[1],
        matrix.num_groups,
        GROUP=matrix.group,
        INNER=inner,
        CHUNKS=chunks,
        FORMAT=matrix.format,
        HAS_OFFSETS=matrix.offsets is not None,
        HAS_ROWS=rows is not None,
        num_warps=4,
    )
    return out


@triton.jit
def _byte_codes(codes, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """8-bit codes as numbers."""
    if FORMAT == "float8_e4m3fn":
        return codes.to(tl.float8e4nv, bitcast=True).to(dtype)
    return codes.to(dtype)


@triton.jit
def _offset(scale, offsets, at, mask, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """What each input of a group is multiplied with, besides its code."""
    if HAS_OFFSETS:
        return tl.load(offsets + at, mask=mask, other=0.0).to(tl.float32)
    if FORMAT == "int4":
        return -8.0 * scale
    return 0.0 * scale


@triton.jit
def _number(words, i: tl.constexpr):
    """Code i of each word: 1 + n / 16, as float32."""
    if i < 5:
        bits = words << (19 - 4 * i)
    else:
        bits = words >> (4 * i - 19)
    return ((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _in_group(products, totals, scales, offsets, at, mask, FORMAT: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    """Part of a sum: of `_number` times inputs, and of the inputs, within a group."""
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    offset = _offset(scale, offsets, at, mask, FORMAT, HAS_OFFSETS)
    return (16.0 * scale) * (products - totals) + offset * totals


@triton.jit
def _scaled_code(
    code, value, scales, offsets, at, mask, FORMAT: tl.constexpr, WHOLE: tl.constexpr, HAS_OFFSETS: tl.constexpr
):
    """Part of a sum over 8-bit codes; one scale for all inputs of an output is left to the end."""
    product = _byte_codes(code, FORMAT, tl.float32) * value
    if WHOLE:
        return product
    scale = tl.load(scales + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_OFFSETS:
        return product * scale + _offset(scale, offsets, at, mask, FORMAT, HAS_OFFSETS) * value
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
    if HAS_BIAS:
        total += tl.load(biases + row).to(tl.float32)
    if ADDS:
        total += tl.load(y + row).to(tl.float32)
    tl.store(y + row, total.to(y.dtype.element_ty), mask=is_in)


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
    num_groups,
    GROUP: tl.constexpr,
    INNER: tl.constexpr,
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
        STEPS: tl.constexpr = 8 // PARTS
        num_words = width // 8
        for first in range(0, num_words, LANES):
            lane = first + lanes
            is_in = lane < num_words
            # read once and never again: what other kernels need stays in the cache
            words0 = tl.load(codes + row0 * num_words + lane, mask=is_in, other=0, eviction_policy="evict_first")
            words1 = tl.load(codes + row1 * num_words + lane, mask=is_in, other=0, eviction_policy="evict_first")
            words2 = tl.load(codes + row2 * num_words + lane, mask=is_in, other=0, eviction_policy="evict_first")
            words3 = tl.load(codes + row3 * num_words + lane, mask=is_in, other=0, eviction_policy="evict_first")
            chunk = lane // INNER
            column = chunk * SPAN + lane % INNER
            for part in tl.static_range(PARTS):
                totals, products0, products1, products2, products3 = zeros, zeros, zeros, zeros, zeros
                for step in tl.static_range(STEPS):
                    i = part * STEPS + step
                    value = tl.load(x + column + i * INNER, mask=is_in, other=0.0).to(tl.float32)
                    products0 += _number(words0, i) * value
                    products1 += _number(words1, i) * value
                    products2 += _number(words2, i) * value
                    products3 += _number(words3, i) * value
                    totals += value
                at = chunk * PARTS + part if GROUP < SPAN else chunk * SPAN // GROUP
                at0, at1, at2 = row0 * num_groups + at, row1 * num_groups + at, row2 * num_groups + at
                at3 = row3 * num_groups + at
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
            at = lane // GROUP
            at0, at1, at2 = row0 * num_groups + at, row1 * num_groups + at, row2 * num_groups + at
            at3 = row3 * num_groups + at
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


@triton.jit(do_not_specialize=["num_tokens"])
def _tiles_kernel(
    x,
    codes,
    scales,
    offsets,
    biases,
    y,
    num_tokens,
    width,
    num_features,
    num_groups,
    y_stride,
    GROUP: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_in, is_token = feature < num_features, token < num_tokens
    inner = tl.arange(0, INNER)
    x_at = x + token.to(tl.int64)[:, None] * width + inner[None, :]
    line = feature.to(tl.int64) * num_groups
    dtype: tl.constexpr = x.dtype.element_ty
    sums = tl.zeros((TOKENS, FEATURES), tl.float32)
    if FORMAT == "int4":
        SPAN: tl.constexpr = 8 * INNER
        PARTS: tl.constexpr = SPAN // GROUP if GROUP < SPAN else 1
        STEPS: tl.constexpr = 8 // PARTS
        code_at = codes + feature.to(tl.int64)[None, :] * (width // 8) + inner[:, None]
        for chunk in range(0, width // SPAN):
            words = tl.load(code_at + chunk * INNER, mask=is_in[None, :], other=0)
            for part in tl.static_range(PARTS):
                products = tl.zeros((TOKENS, FEATURES), tl.float32)
                totals = tl.zeros((TOKENS,), tl.float32)
                for step in tl.static_range(STEPS):
                    i = part * STEPS + step
                    value = tl.load(x_at + chunk * SPAN + i * INNER, mask=is_token[:, None], other=0.0)
                    number = ((words >> (4 * i)) & 15).to(dtype)
                    products = tl.dot(value, number, products, input_precision="ieee")
                    totals += tl.sum(value.to(tl.float32), 1)
                group = chunk * PARTS + part if GROUP < SPAN else chunk * SPAN // GROUP
                scale = tl.load(scales + line + group, mask=is_in, other=0.0).to(tl.float32)
                offset = _offset(scale, offsets, line + group, is_in, FORMAT, HAS_OFFSETS)
                sums += products * scale[None, :] + totals[:, None] * offset[None, :]
    else:
        code_at = codes + feature.to(tl.int64)[None, :] * width + inner[:, None]
        for first in range(0, width, INNER):
            is_column = first + inner < width
            value = tl.load(x_at + first, mask=is_token[:, None] & is_column[None, :], other=0.0)
            found = tl.load(code_at + first, mask=is_in[None, :] & is_column[:, None], other=0)
            number = _byte_codes(found, FORMAT, dtype)
            products = tl.dot(value, number, input_precision="ieee")
            scale = tl.load(scales + line + first // GROUP, mask=is_in, other=0.0).to(tl.float32)
            sums += products * scale[None, :]
            if HAS_OFFSETS:
                offset = _offset(scale, offsets, line + first // GROUP, is_in, FORMAT, HAS_OFFSETS)
                sums += tl.sum(value.to(tl.float32), 1)[:, None] * offset[None, :]
    if HAS_BIAS:
        sums += tl.load(biases + feature, mask=is_in, other=0.0).to(tl.float32)[None, :]
    y_at = y + token.to(tl.int64)[:, None] * y_stride + feature[None, :]
    is_out = is_token[:, None] & is_in[None, :]
    if ADDS:
        sums += tl.load(y_at, mask=is_out, other=0.0).to(tl.float32)
    tl.store(y_at, sums.to(y.dtype.element_ty), mask=is_out)


@triton.jit
def _numbers_kernel(
    codes,
    scales,
    offsets,
    rows,
    out,
    width,
    num_groups,
    GROUP: tl.constexpr,
    INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    to = out + row * width
    if HAS_ROWS:
        row = tl.load(rows + row).to(tl.int64)
    inner = tl.arange(0, INNER)
    if FORMAT == "int4":
        SPAN: tl.constexpr = 8 * INNER
        at = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
        is_word = (at < width // SPAN)[:, None]
        words = tl.load(codes + row * (width // 8) + at[:, None] * INNER + inner[None, :], mask=is_word, other=0)
        for i in tl.static_range(8):
            column = at[:, None] * SPAN + i * INNER + inner[None, :]
            group = row * num_groups + column // GROUP
            scale = tl.load(scales + group, mask=is_word, other=0.0).to(tl.float32)
            offset = _offset(scale, offsets, group, is_word, FORMAT, HAS_OFFSETS)
            number = ((words >> (4 * i)) & 15).to(tl.float32) * scale + offset
            tl.store(to + column, number.to(out.dtype.element_ty), mask=is_word)
    else:
        column = tl.program_id(1) * CHUNKS * INNER + tl.arange(0, CHUNKS * INNER)
        is_column = column < width
        found = tl.load(codes + row * width + column, mask=is_column, other=0)
        group = row * num_groups + column // GROUP
        scale = tl.load(scales + group, mask=is_column, other=0.0).to(tl.float32)
        number = _byte_codes(found, FORMAT, tl.float32) * scale
        if HAS_OFFSETS:
            number += _offset(scale, offsets, group, is_column, FORMAT, HAS_OFFSETS)
        tl.store(to + column, number.to(out.dtype.element_ty), mask=is_column)
