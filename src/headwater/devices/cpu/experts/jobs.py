"""Jobs of the CPU kernels of a layer of experts, field by field as in kernels/linear/experts.c."""

import ctypes

from headwater.devices.cpu.linear_kernels import LinearJob

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


class RouteJob(ctypes.Structure):
    """`RouteJob`: the experts of each token and their weights."""

    _fields_ = (
        ("logits", _POINTER),
        ("experts", _POINTER),
        ("weights", _POINTER),
        ("num_experts", _INT64),
        ("per_token", _INT64),
        ("renormalises", _INT64),
    )


class GroupJob(ctypes.Structure):
    """`GroupJob`: places for the rows of all tokens' experts, and tiles of the rows of one expert."""

    _fields_ = (
        ("experts", _POINTER),
        ("tokens", _POINTER),
        ("places", _POINTER),
        ("tiles", _POINTER),
        ("num_tiles", _POINTER),
        ("ends", _POINTER),
        ("num_experts", _INT64),
        ("per_token", _INT64),
    )


class ExpertInputsJob(ctypes.Structure):
    """`ExpertInputsJob`: activations for the products of the rows at all places."""

    _fields_ = (
        ("x", _POINTER),
        ("tokens", _POINTER),  # or None: x has a row for each place
        ("y", _POINTER),
        ("in_features", _INT64),
        ("format", _INT64),
        ("per_token", _INT64),
    )


class ExpertsJob(ctypes.Structure):
    """`ExpertsJob`: the product of each tile's rows with the weights of its expert."""

    _anonymous_ = ("product",)
    _fields_ = (
        ("product", LinearJob),
        ("tiles", _POINTER),
        ("num_tiles", _POINTER),
        ("expert_bytes", _INT64),
        ("expert_biases", _INT64),
        ("per_token", _INT64),
    )


class SumExpertsJob(ctypes.Structure):
    """`SumExpertsJob`: the sum of each token's results by weight."""

    _fields_ = (
        ("x", _POINTER),
        ("weights", _POINTER),
        ("places", _POINTER),
        ("y", _POINTER),
        ("size", _INT64),
        ("per_token", _INT64),
        ("mode", _INT64),
    )
