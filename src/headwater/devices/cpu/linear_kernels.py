"""Jobs of the CPU kernels around linear layers, field by field as in kernels/*.h and *.c.

A product with quantised weights takes quantised activations: `quantize` writes them once for all products of the same
input. Products with float32 and 16-bit weights take float32.
"""

import ctypes
from enum import IntEnum

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


class Mode(IntEnum):
    """What becomes of a product (`enum Mode` of kernels/linear/linear.h)."""

    STORE = 0
    ADD = 1  # to what y holds
    GATED = 2  # y = activation(gate) * up


class LinearJob(ctypes.Structure):
    """`LinearJob` of kernels/linear/linear.h: y = x W^T + b with packed weights (packed_weights.py)."""

    _fields_ = (
        ("weights", _POINTER),
        ("bias", _POINTER),  # or None
        ("x", _POINTER),  # float32[rows, in_features], or what `quantize` wrote
        ("y", _POINTER),  # float32[rows, y_stride]: out_features columns are written
        ("in_features", _INT64),
        ("out_features", _INT64),
        ("y_stride", _INT64),
        ("format", _INT64),
        ("mode", _INT64),
        ("activation", _INT64),  # of GATED, an index of ACTIVATIONS
        ("rows", _INT64),  # TOKENS or SELECTED of kernel_library.py
        ("activations", _POINTER),  # fuse_activations of packed_layers.py
        ("activation_format", _INT64),
    )


class QuantizeJob(ctypes.Structure):
    """`QuantizeJob` of kernels/linear/quantize.c: float32[rows, in_features] to the activations of `format`."""

    _fields_ = (
        ("x", _POINTER), ("y", _POINTER), ("in_features", _INT64), ("format", _INT64), ("rows", _INT64),
        ("only_decodes", _INT64),  # fuse_activations of packed_layers.py
    )  # fmt: skip


class EmbedJob(ctypes.Structure):
    """`EmbedJob` of kernels/linear/embed.c: `scale` times rows of packed weights by the step's token ids.

    The result is float32[T, in_features]. The weights are those of `num_tokens` tokens from `first_token` on; others
    get zeros.
    """

    _fields_ = (
        ("weights", _POINTER),
        ("y", _POINTER),
        ("in_features", _INT64),
        ("format", _INT64),
        ("first_token", _INT64),
        ("num_tokens", _INT64),
        ("scale", ctypes.c_float),
    )
