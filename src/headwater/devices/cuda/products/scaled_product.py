"""Products with float8 weights in the card's float8 units: activations become float8 as well.

Each token has a scale of its own, or one for each group of inputs where the weights have: as checkpoints with dynamic
activation scales are served elsewhere. One token alone is multiplied as it is: there the weights' bytes take the time.
"""

# Triton kernels are no plain Python: their launch options and arithmetic are unknown to a type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false

import functools

import torch
import triton
import triton.language as tl

from headwater.devices.cuda.kernels.coded.tiles import add_sums, tiles
from headwater.devices.cuda.kernels.launch import Launcher, alignment
from headwater.devices.cuda.products.coded_matrix import CodedMatrix

_MIN_CAPABILITY = (9, 0)  # scales of rows and columns
_UNIT = 16  # the library's sizes must be multiples of it
_MIN_GROUP = 32  # inputs of a product in float8 units
_MOST_TOKENS_OF_TILES = 128  # beyond, the library is faster, where it knows the scales
_MOST_TOKENS_OF_GROUPS = 128  # beyond, plain numbers are the faster way
_ROUNDED_AT_ONCE = 4096
_LARGEST = tl.constexpr(448.0)


def suits_scaled_product(x: torch.Tensor, matrix: CodedMatrix) -> bool:
    """Whether the card multiplies these in float8: Hopper or newer."""
    if matrix.format != "float8_e4m3fn" or matrix.offsets is not None or x.dtype != torch.bfloat16:
        return False
    group = matrix.group
    is_whole = matrix.num_groups == 1
    fits = is_whole or (group >= _MIN_GROUP and group & -group == group and len(x) <= _MOST_TOKENS_OF_GROUPS)
    return fits and x.is_cuda and _has_units(x.device)


def scaled_product(
    x: torch.Tensor, matrix: CodedMatrix, bias: torch.Tensor | None, y: torch.Tensor, *, adds: bool
) -> None:
    """y = x W^T + b, or y += x W^T + b. [T, in] -> [T, out], whose rows may be parts of longer ones."""
    codes, scales = round_tokens(x, matrix.group)
    num_features, width = matrix.shape
    is_library_s = matrix.num_groups == 1 and num_features % _UNIT == 0 and width % _UNIT == 0
    if len(x) <= _MOST_TOKENS_OF_TILES or not is_library_s:
        tiles(codes, matrix, bias, y, adds=adds, token_scales=scales)
        return
    weight, columns = matrix.codes.view(torch.float8_e4m3fn).t(), matrix.scales.float().t()
    is_own = not adds and y.dtype == torch.bfloat16 and y.is_contiguous()
    product = y if is_own else torch.empty((len(x), num_features), dtype=torch.bfloat16, device=x.device)
    torch._scaled_mm(codes, weight, scales, columns, bias, out_dtype=torch.bfloat16, out=product)
    if not is_own:
        add_sums(product[None], None, y, adds=adds)


def round_tokens(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's groups of inputs as float8 with a scale: float8_e4m3fn[T, in], float32[T, in / group]."""
    num_tokens, width = x.shape
    num_groups = triton.cdiv(width, group)
    codes = torch.empty((num_tokens, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_tokens, num_groups), dtype=torch.float32, device=x.device)
    if num_tokens:
        block = triton.next_power_of_2(group)
        groups = max(1, min(triton.next_power_of_2(num_groups), _ROUNDED_AT_ONCE // block))
        num_warps = max(1, min(16, groups * block // 512))
        sizes = (width, num_groups)
        flags = (group, groups, block)
        key = (x.device.index, x.dtype, *sizes, *flags, *alignment(x, codes, scales))
        grid = (num_tokens, triton.cdiv(num_groups, groups))
        _launch_round(grid, x, codes.view(torch.int8), scales, *sizes, *flags, key=key, num_warps=num_warps)
    return codes, scales


@functools.cache
def _has_units(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY


@triton.jit
def _round_kernel(
    x, codes, scales, width, num_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, BLOCK)
    place = group[:, None] * GROUP + column[None, :]
    at = token * width + place
    is_group = group < num_groups
    is_in = (place < width) & (column < GROUP)[None, :]
    value = tl.load(x + at, mask=is_in, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 1)
    scale = tl.where(largest > 0, largest, _LARGEST) / _LARGEST
    rounded = tl.minimum(tl.maximum(value / scale[:, None], -_LARGEST), _LARGEST).to(tl.float8e4nv)
    tl.store(codes + at, rounded.to(tl.int8, bitcast=True), mask=is_in)
    tl.store(scales + token * num_groups + group, scale, mask=is_group)


_launch_round = Launcher(_round_kernel)
