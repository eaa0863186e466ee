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
_ONE_TOKEN_FEATURES = 4
_ONE_TOKEN_NUMBERS = 1024  # of each output, at a time
_MIN_TILE = 16  # inputs of a product in tiles, at least


def has_tiles(matrix: CodedMatrix) -> bool:
    """Whether its codes can be multiplied in tiles: not those of 4 bits in short chunks."""
    return matrix.words >= _MIN_TILE or matrix.format != "int4"


def one_token(x: torch.Tensor, matrix: CodedMatrix, bias: torch.Tensor | None, y: torch.Tensor, *, adds: bool) -> None:
    """y = x W^T + b, or y += x W^T + b. [1, in] -> [1, out]"""
    num_features, width = matrix.shape
    inner = matrix.words if matrix.format == "int4" else matrix.inner
    per_part = 8 if matrix.format == "int4" else 1
    parts = max(1, min(triton.next_power_of_2(width), _ONE_TOKEN_NUMBERS) // (inner * per_part))
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
        INNER=inner,
        CHUNKS=parts,
        FEATURES=_ONE_TOKEN_FEATURES,
        FORMAT=matrix.format,
        HAS_OFFSETS=matrix.offsets is not None,
        HAS_BIAS=bias is not None,
        ADDS=adds,
        num_warps=4,
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
    CHUNKS: tl.constexpr,
    FEATURES: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
):
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    is_in = feature < num_features
    chunk = tl.arange(0, CHUNKS)
    inner = tl.arange(0, INNER)
    row = feature.to(tl.int64)[:, None, None]
    sums = tl.zeros((FEATURES, CHUNKS, INNER), tl.float32)
    if FORMAT == "int4":
        SPAN: tl.constexpr = 8 * INNER  # inputs of a chunk of words
        PARTS: tl.constexpr = SPAN // GROUP if GROUP < SPAN else 1  # groups of a chunk
        STEPS: tl.constexpr = 8 // PARTS
        for first in range(0, width // SPAN, CHUNKS):
            at = first + chunk
            is_chunk = at < width // SPAN
            is_word = is_in[:, None, None] & is_chunk[None, :, None]
            place = (at[:, None] * INNER + inner[None, :])[None, :, :]
            # read once and never again: what other kernels need stays in the cache
            words = tl.load(codes + row * (width // 8) + place, mask=is_word, other=0, eviction_policy="evict_first")
            for part in tl.static_range(PARTS):
                products = tl.zeros((FEATURES, CHUNKS, INNER), tl.float32)
                totals = tl.zeros((CHUNKS, INNER), tl.float32)
                for step in tl.static_range(STEPS):
                    i = part * STEPS + step
                    column = at[:, None] * SPAN + i * INNER + inner[None, :]
                    value = tl.load(x + column, mask=is_chunk[:, None], other=0.0).to(tl.float32)
                    if i < 5:
                        bits = words << (19 - 4 * i)
                    else:
                        bits = words >> (4 * i - 19)
                    number = ((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True)  # 1 + n / 16
                    products += number * value[None, :, :]
                    totals += value
                group = (at * PARTS + part if GROUP < SPAN else at * SPAN // GROUP)[None, :, None]
                scale = tl.load(scales + row * num_groups + group, mask=is_word, other=0.0).to(tl.float32)
                offset = _offset(scale, offsets, row * num_groups + group, is_word, FORMAT, HAS_OFFSETS)
                sums += (16.0 * scale) * (products - totals[None, :, :]) + offset * totals[None, :, :]
    else:
        for first in range(0, width, CHUNKS * INNER):
            at = first + chunk * INNER
            column = at[:, None] + inner[None, :]
            is_column = column < width
            is_code = is_in[:, None, None] & is_column[None, :, :]
            place = row * width + column[None, :, :]
            found = tl.load(codes + place, mask=is_code, other=0, eviction_policy="evict_first")
            value = tl.load(x + column, mask=is_column, other=0.0).to(tl.float32)[None, :, :]
            group = (at // GROUP)[None, :, None]
            is_group = is_in[:, None, None] & (at < width)[None, :, None]
            scale = tl.load(scales + row * num_groups + group, mask=is_group, other=0.0).to(tl.float32)
            sums += _byte_codes(found, FORMAT, tl.float32) * value * scale
            if HAS_OFFSETS:
                sums += _offset(scale, offsets, row * num_groups + group, is_group, FORMAT, HAS_OFFSETS) * value
    total = tl.sum(tl.sum(sums, 2), 1)
    if HAS_BIAS:
        total += tl.load(biases + feature, mask=is_in, other=0.0).to(tl.float32)
    if ADDS:
        total += tl.load(y + feature, mask=is_in, other=0.0).to(tl.float32)
    tl.store(y + feature, total.to(y.dtype.element_ty), mask=is_in)


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
