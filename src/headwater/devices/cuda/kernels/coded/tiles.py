"""Some tokens times a coded matrix: codes become floats on the way to the tensor cores."""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.coded.parts import byte_codes, offset_of
from headwater.devices.cuda.products.coded_matrix import CodedMatrix

MAX_TILE_TOKENS = 128  # above, plain numbers in a library's product are the faster way
_TILE_TOKENS = (16, 32, 64)
_MIN_TILE = 16  # inputs of a product in tiles, at least


def has_tiles(matrix: CodedMatrix) -> bool:
    """Whether its codes can be multiplied in tiles: not those of 4 bits in short chunks."""
    return matrix.words >= _MIN_TILE or matrix.format != "int4"


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


@triton.jit
def _tile_number(words, i: tl.constexpr, dtype: tl.constexpr):
    """Code i of each word, and `_above`: a 16-bit float whose lowest bits are the code's needs no conversion."""
    if dtype == tl.bfloat16:  # 16 + n
        bits = words << 3 if i == 0 else words >> (4 * i - 3)
        return ((bits & 0x78) | 0x4180).to(tl.int16).to(tl.bfloat16, bitcast=True)
    if dtype == tl.float16:  # 64 + n
        bits = words << 4 if i == 0 else words >> (4 * i - 4)
        return ((bits & 0xF0) | 0x5400).to(tl.int16).to(tl.float16, bitcast=True)
    return ((words >> (4 * i)) & 15).to(dtype)


@triton.jit
def _above(dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        return 16.0
    if dtype == tl.float16:
        return 64.0
    return 0.0


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
                    number = _tile_number(words, i, dtype)
                    products = tl.dot(value, number, products, input_precision="ieee")
                    totals += tl.sum(value.to(tl.float32), 1)
                group = chunk * PARTS + part if GROUP < SPAN else chunk * SPAN // GROUP
                scale = tl.load(scales + line + group, mask=is_in, other=0.0).to(tl.float32)
                offset = offset_of(scale, offsets, line + group, is_in, FORMAT, HAS_OFFSETS)
                products -= _above(dtype) * totals[:, None]
                sums += products * scale[None, :] + totals[:, None] * offset[None, :]
    else:
        code_at = codes + feature.to(tl.int64)[None, :] * width + inner[:, None]
        for first in range(0, width, INNER):
            is_column = first + inner < width
            value = tl.load(x_at + first, mask=is_token[:, None] & is_column[None, :], other=0.0)
            found = tl.load(code_at + first, mask=is_in[None, :] & is_column[:, None], other=0)
            number = byte_codes(found, FORMAT, dtype)
            products = tl.dot(value, number, input_precision="ieee")
            scale = tl.load(scales + line + first // GROUP, mask=is_in, other=0.0).to(tl.float32)
            sums += products * scale[None, :]
            if HAS_OFFSETS:
                offset = offset_of(scale, offsets, line + first // GROUP, is_in, FORMAT, HAS_OFFSETS)
                sums += tl.sum(value.to(tl.float32), 1)[:, None] * offset[None, :]
    if HAS_BIAS:
        sums += tl.load(biases + feature, mask=is_in, other=0.0).to(tl.float32)[None, :]
    y_at = y + token.to(tl.int64)[:, None] * y_stride + feature[None, :]
    is_out = is_token[:, None] & is_in[None, :]
    if ADDS:
        sums += tl.load(y_at, mask=is_out, other=0.0).to(tl.float32)
    tl.store(y_at, sums.to(y.dtype.element_ty), mask=is_out)
