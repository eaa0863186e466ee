"""Norms of the residual stream in the form that their reader takes: plain, in float8, or left to the reader."""

from collections.abc import Sequence
from typing import Any

import torch

from headwater.devices.cuda.experts import CudaExperts
from headwater.devices.cuda.kernels.layers import rms_norm
from headwater.devices.cuda.kernels.rounded import add_and_norm
from headwater.devices.cuda.kernels.rows import Rows, UnnormedRows
from headwater.devices.cuda.products.coded_linear import CodedLinear
from headwater.devices.cuda.products.gated_linear import CudaGatedLinear
from headwater.devices.cuda.products.linear import CudaLinear

Reader = CudaLinear | CodedLinear | CudaGatedLinear | CudaExperts


def read_norm(
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    scale: float = 1.0,
    reader: Reader | None = None,
) -> Rows:
    """ModelDevice.rms_norm: [T, features] of float32[T, features]."""
    if reader is not None:
        assert scale == 1.0, "logits are read as they are"
        if reader.norms(len(residual)):
            return UnnormedRows(residual, weight, eps, offset)
        group = reader.rounding(len(residual), weight)
        if group is not None:
            return add_and_norm(None, residual, weight, eps, offset=offset, group=group)
    return rms_norm(residual, weight, eps, offset=offset, scale=scale)


def add_and_read_norm(
    block: CudaLinear | CodedLinear | CudaExperts,
    residual: torch.Tensor,
    inputs: Sequence[Any],
    weight: torch.Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    reader: Reader | None = None,
) -> Rows:
    """ModelDevice.add_and_norm: in one kernel, where the block's result is a sum that is still to be made."""
    parts = None if reader is not None and reader.norms(len(residual)) else block.parts(*inputs)
    if parts is None:
        block.add_to(residual, *inputs)
        return read_norm(residual, weight, eps, offset=offset, reader=reader)
    group = None if reader is None else reader.rounding(len(residual), weight)
    return add_and_norm(parts, residual, weight, eps, offset=offset, group=group)
