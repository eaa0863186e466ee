"""Weights of every format, and one product by the kernels: what the tests of linear layers share."""

import ctypes

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from headwater.devices.cpu.kernel_build import SOURCES
from headwater.devices.cpu.kernel_library import TOKENS, KernelLibrary, Step
from headwater.devices.cpu.linear_kernels import LinearJob, Mode, QuantizeJob
from headwater.devices.cpu.packed_weights import (
    FORMATS,
    PackedWeights,
    activation_bytes,
    converts_activations,
    has_tiles,
)
from headwater.devices.host_tensor import HostTensor

# What a library needs for products and norms, and for products of whole matrices alone.
PRODUCTS = (*SOURCES.glob("linear/*.c"), *(SOURCES / name for name in ("norm.c", "run.c", "pool.c", "machine/pin.c")))
_MATRICES = "linear/linear.c linear/amx_product.c linear/quantize.c linear/pack.c run.c pool.c machine/pin.c"
MATRIX_PRODUCTS = tuple(SOURCES / name for name in _MATRICES.split())
BLOCKS = tuple(format for format in FORMATS if format not in ("float32", "bfloat16", "float16"))
GROUP_OF = {format: 256 if format.endswith("K") else 32 if format in BLOCKS else 2 for format in FORMATS}
BITS_OF_ACTIVATIONS = {"Q8_0": 32767} | dict.fromkeys(FORMATS[4:], 127)  # the largest integer


def weight(format: str, shape: tuple[int, int], seed: int = 0) -> HostTensor:
    """Random weights; K-quants are random bytes, for gguf cannot quantise to them."""
    rng = np.random.default_rng(seed)
    values = rng.normal(scale=0.05, size=shape).astype(np.float32)
    if format not in BLOCKS:
        return HostTensor.of(values).astype(format)
    if not format.endswith("K"):
        return HostTensor(format, shape, quantize(values, GGMLQuantizationType[format]))
    sizes = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
    blocks = rng.integers(0, 256, (shape[0], shape[1] // 256, sizes[format]), dtype=np.uint8)
    scales = rng.uniform(1e-4, 3e-4, (*blocks.shape[:2], 2)).astype(np.float16).view(np.uint8)
    if format == "Q6_K":
        blocks[..., 208:] = scales[..., :2]
    else:
        blocks[..., :4] = scales
    return HostTensor(format, shape, blocks.reshape(shape[0], -1))


def values_of(tensor: HostTensor) -> np.ndarray:
    """The numbers as gguf's own reader has them."""
    if tensor.format in BLOCKS:
        return dequantize(tensor.data, GGMLQuantizationType[tensor.format]).reshape(tensor.shape)
    return tensor.to_float32()


def aligned(num_bytes: int) -> np.ndarray:
    whole = np.zeros(num_bytes + 64, np.uint8)
    begin = -whole.ctypes.data % 64
    return whole[begin : begin + num_bytes]


def step_of(num_tokens: int, **fields: int) -> Step:
    return Step(num_tokens=num_tokens, num_rows=1, num_selected=num_tokens, **fields)


def quantize_rows(library: KernelLibrary, x: np.ndarray, format: str, *, num_decodes: int = 0) -> np.ndarray:
    """uint8[rows, bytes of a row of activations]"""
    row_bytes = activation_bytes(library, format, x.shape[1])
    out = aligned(len(x) * row_bytes)
    job = QuantizeJob(
        x=x.ctypes.data, y=out.ctypes.data, in_features=x.shape[1], format=FORMATS.index(format), rows=TOKENS
    )
    library.run("quantize", job, step_of(len(x), num_decodes=num_decodes))
    return out.reshape(len(x), row_bytes)


def uses_tiles(library: KernelLibrary, format: str) -> bool:
    """Whether this library multiplies weights of the format by AMX: with activations and weights in bfloat16."""
    return has_tiles(library) and format not in ("float32", "float16")


def multiply(
    library: KernelLibrary,
    packed: PackedWeights,
    x: np.ndarray,
    *,
    mode: Mode | None = None,
    y: np.ndarray | None = None,
    chunks: list[int] | None = None,
    num_decodes: int = 0,
) -> np.ndarray:
    """x W^T + b by the kernels, chunk after chunk (in the order `chunks`). [T, in] -> [T, out]

    With AMX, the first `num_decodes` rows are computed in registers.
    """
    x = np.ascontiguousarray(x, np.float32)
    y = np.full((len(x), packed.out_features), np.nan, np.float32) if y is None else y
    activations = x
    if converts_activations(library, packed.format):
        activations = quantize_rows(library, x, packed.format, num_decodes=num_decodes)
    job = LinearJob(
        weights=packed.blocks.ctypes.data,
        bias=None if packed.bias is None else packed.bias.ctypes.data,
        x=activations.ctypes.data,
        y=y.ctypes.data,
        in_features=packed.in_features,
        out_features=packed.out_features,
        y_stride=y.strides[0] // 4,
        format=packed.format_id,
        mode=mode if mode is not None else Mode.GATED if packed.is_gated else Mode.STORE,
        rows=TOKENS,
    )
    step, kernel, address = step_of(len(x), num_decodes=num_decodes), library.kernel("linear"), ctypes.addressof(job)
    count = kernel.num_chunks(address, ctypes.byref(step))
    for chunk in range(count) if chunks is None else chunks:
        kernel.run_chunk(address, ctypes.byref(step), chunk)
    return y
