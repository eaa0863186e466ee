"""Weights of every kind as their tensors, for updates in place."""

import torch

from headwater.devices.cuda.products.coded_linear import Weight
from headwater.devices.cuda.products.coded_matrix import CodedMatrix
from headwater.devices.cuda.products.mxfp4_matrix import Mxfp4Matrix


def is_alike(target: Weight | Mxfp4Matrix, source: Weight | Mxfp4Matrix) -> bool:
    """Whether a weight can be copied into the memory of another."""
    if isinstance(target, Mxfp4Matrix):
        return isinstance(source, Mxfp4Matrix) and target.shape == source.shape
    if isinstance(target, CodedMatrix):
        return target.is_like(source) and target.shape == source.shape
    return isinstance(source, torch.Tensor)


def tensors_of(weight: Weight | Mxfp4Matrix) -> list[torch.Tensor]:
    """The memory of a weight."""
    return [weight] if isinstance(weight, torch.Tensor) else weight.tensors()
