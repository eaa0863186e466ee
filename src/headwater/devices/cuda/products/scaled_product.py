"""Products of many tokens with float8 weights in the card's float8 units: activations become float8 as well.

Each token has a scale of its own, as checkpoints with dynamic activation scales are served elsewhere. Few tokens are
multiplied as they are: there the weights' bytes take the time.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false

import functools

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.products.coded_matrix import CodedMatrix

_MIN_CAPABILITY = (9, 0)  # scales of rows and columns
_UNIT = 16  # sizes must be multiples of it
_LARGEST = tl.constexpr(448.0)


def suits_scaled_product(x: torch.Tensor, matrix: CodedMatrix) -> bool:
    """Whether the card multiplies these in float8: weights with one scale for each output, on Hopper or newer."""
    is_whole = matrix.format == "float8_e4m3fn" and matrix.group == matrix.shape[1] and matrix.offsets is None
    fits = matrix.shape[0] % _UNIT == 0 and matrix.shape[1] % _UNIT == 0
    return is_whole and fits and x.is_cuda and x.dtype == torch.bfloat16 and _has_units(x.device)


def scaled_product(x: torch.Tensor, matrix: CodedMatrix, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b in bfloat16. [T, in] -> [T, out]"""
    codes, scales = round_tokens(x)
    weight = matrix.codes.view(torch.float8_e4m3fn).t()
    columns = matrix.scales.float().t().contiguous()
    return torch._scaled_mm(codes, weight, scale_a=scales, scale_b=columns, bias=bias, out_dtype=torch.bfloat16)


def round_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token as float8 with a scale: float8_e4m3fn[T, in], float32[T, 1]."""
    num_tokens, width = x.shape
    codes = torch.empty((num_tokens, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_tokens, 1), dtype=torch.float32, device=x.device)
    if num_tokens:
        block = triton.next_power_of_2(width)
        num_warps = max(1, min(16, block // 512))
        _round_kernel[(num_tokens,)](x, codes.view(torch.int8), scales, width, BLOCK=block, num_warps=num_warps)
    return codes, scales


@functools.cache
def _has_units(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY


@triton.jit
def _round_kernel(x, codes, scales, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_in = column < width
    value = tl.load(x + token * width + column, mask=is_in, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    scale = tl.where(largest > 0, largest, _LARGEST) / _LARGEST
    rounded = tl.minimum(tl.maximum(value / scale, -_LARGEST), _LARGEST).to(tl.float8e4nv)
    tl.store(codes + token * width + column, rounded.to(tl.int8, bitcast=True), mask=is_in)
    tl.store(scales + token, scale)
