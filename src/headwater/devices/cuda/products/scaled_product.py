"""Products with float8 weights in the card's float8 units: activations become float8 as well.

Each token has a scale of its own, or one for each group of inputs where the weights have: as checkpoints with dynamic
activation scales are served elsewhere. One token alone is multiplied as it is: there the weights' bytes take the time.
"""

# pyright: reportPrivateImportUsage=false

import functools

import torch

from headwater.devices.cuda.kernels.coded.tiles import add_sums, tile_parts, tiles
from headwater.devices.cuda.kernels.rows import Like, Parts, RoundedRows, Scales, Unscaled
from headwater.devices.cuda.products.coded_matrix import CodedMatrix

_MIN_CAPABILITY = (9, 0)  # scales of rows and columns
_UNIT = 16  # the library's sizes must be multiples of it
_MIN_GROUP = 32  # inputs of a product in float8 units
_MOST_UNSCALED = 512  # tokens up to which the library is faster where it does not know the scales
_MOST_TOKENS_OF_GROUPS = 128  # beyond, plain numbers are the faster way


def suits_scaled_product(like: Like, matrix: CodedMatrix, num_tokens: int) -> bool:
    """Whether the card multiplies so many tokens, of `like`'s dtype, in float8: Hopper or newer."""
    if num_tokens < 2 or matrix.format != "float8_e4m3fn" or matrix.offsets is not None or like.dtype != torch.bfloat16:
        return False
    group = matrix.group
    is_whole = matrix.num_groups == 1
    fits = is_whole or (group >= _MIN_GROUP and group & -group == group and num_tokens <= _MOST_TOKENS_OF_GROUPS)
    return fits and _has_units(like.device)


def scaled_product(
    x: RoundedRows, matrix: CodedMatrix, bias: torch.Tensor | None, y: torch.Tensor, *, adds: bool
) -> None:
    """y = x W^T + b, or y += x W^T + b. [T, in] -> [T, out], whose rows may be parts of longer ones."""
    if not _suits_library(matrix):
        tiles(x.codes, matrix, bias, y, adds=adds, token_scales=x.scales)
    elif _wants_scales(x) and not adds and y.dtype == torch.bfloat16 and y.is_contiguous():
        _library_product(x, matrix, bias, out=y)
    else:
        add_sums(scaled_parts(x, matrix, bias), y, adds=adds)


def scaled_parts(x: RoundedRows, matrix: CodedMatrix, bias: torch.Tensor | None) -> Parts:
    """x W^T + b as a sum."""
    if not _suits_library(matrix):
        return Parts(tile_parts(x.codes, matrix, token_scales=x.scales), bias)
    if _wants_scales(x):
        return Parts(_library_product(x, matrix, None)[None], bias)
    found = unscaled_product(x, matrix)
    return Parts(found.product[None], bias, scales=found.scales)


def suits_unscaled(x: RoundedRows, matrix: CodedMatrix) -> bool:
    """Whether `unscaled_product` is the faster way."""
    return _suits_library(matrix) and not _wants_scales(x)


def unscaled_product(x: RoundedRows, matrix: CodedMatrix) -> Unscaled:
    """x W^T of the codes alone: with a scale for each row, the library is up to twice as slow for some tokens."""
    weight, one = matrix.codes.view(torch.float8_e4m3fn).t(), unit_scale(x.device)
    product = torch._scaled_mm(x.codes, weight, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return Unscaled(product, Scales(x.scales.view(-1), matrix.scales.float().view(-1)))


@functools.cache
def unit_scale(device: torch.device) -> torch.Tensor:
    """1, for the library. It must be there before a CUDA graph is captured."""
    return torch.ones((), dtype=torch.float32, device=device)


def _suits_library(matrix: CodedMatrix) -> bool:
    num_features, width = matrix.shape
    return matrix.num_groups == 1 and num_features % _UNIT == 0 and width % _UNIT == 0


def _wants_scales(x: RoundedRows) -> bool:
    return len(x) > _MOST_UNSCALED


def _library_product(
    x: RoundedRows, matrix: CodedMatrix, bias: torch.Tensor | None, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """bfloat16[T, out]"""
    weight, columns = matrix.codes.view(torch.float8_e4m3fn).t(), matrix.scales.float().t()
    if out is None:
        out = torch.empty((len(x), matrix.shape[0]), dtype=torch.bfloat16, device=x.device)
    # sums of the units themselves: their error is that of results in bfloat16, and small beside that of float8
    return torch._scaled_mm(
        x.codes, weight, x.scales, columns, bias, out_dtype=torch.bfloat16, use_fast_accum=True, out=out
    )


@functools.cache
def _has_units(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _MIN_CAPABILITY
