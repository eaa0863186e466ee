"""The layers of a CPU with kernels: called with a program's arrays, they record products with packed weights.

Matrices of one format that follow each other become one product; others fill columns of the same rows.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from headwater.devices.cpu.kernel_library import TOKENS, KernelLibrary
from headwater.devices.cpu.linear_kernels import EmbedJob, LinearJob, Mode, QuantizeJob
from headwater.devices.cpu.packed_weights import (
    FORMATS,
    PackedWeights,
    activation_bytes,
    needs_quantized_activations,
    pack,
    pack_gated,
    packed_format,
    unpack,
)
from headwater.devices.cpu.program import Array, Columns, TokenIds
from headwater.devices.host_tensor import HostTensor

Part = tuple[HostTensor, HostTensor | None]


class PackedLinear:
    """A linear layer (device.Linear) by the kernels."""

    def __init__(
        self,
        library: KernelLibrary,
        weights: Sequence[HostTensor],
        biases: Sequence[HostTensor] | None = None,
        *,
        num_threads: int,
    ) -> None:
        parts = list(zip(weights, biases or [None] * len(weights), strict=True))
        self._library = library
        self._biases = [bias for _, bias in parts]
        self._formats = [weight.format for weight in weights]
        self._sizes = [weight.shape[0] for weight in weights]
        self.in_features = weights[0].shape[1]
        self.out_features = sum(self._sizes)
        groups = [list(group) for _, group in groupby(parts, key=lambda part: packed_format(part[0]))]
        self._packed = [_pack(library, group, num_threads) for group in groups]

    def __call__(self, x: Array) -> Array:
        y = x.program.array(x.rows, self.out_features)
        self._record(x, y, Mode.STORE)
        return y

    def add_to(self, residual: Array, x: Array) -> None:
        self._record(x, residual, Mode.ADD)

    def logits(self, x: Array, out: None = None) -> Array:
        assert out is None, "a program has the memory of its arrays"
        return self(x)

    def embed(self, token_ids: TokenIds) -> Array:
        (packed,) = self._packed
        y = token_ids.program.array(TOKENS, self.in_features)
        job = EmbedJob(weights=packed.blocks.ctypes.data, in_features=self.in_features, format=packed.format_id)
        token_ids.program.append("embed", job, {"y": y}, keeps=(packed,))
        return y

    def unpack(self) -> list[Part]:
        rows = [matrix for packed in self._packed for matrix in unpack(self._library, packed)]
        parts, whole, first = [], rows.pop(0), 0
        for size, format, bias in zip(self._sizes, self._formats, self._biases, strict=True):
            if first == len(whole):
                whole, first = rows.pop(0), 0
            parts.append((_in_format(HostTensor.of(whole[first : first + size]), format), bias))
            first += size
        return parts

    def _record(self, x: Array, y: Array, mode: Mode) -> None:
        activations, first = _Activations(self._library, x), 0
        for packed in self._packed:
            part = y.columns(first, packed.out_features)
            _record_product(packed, activations.for_format(packed.format), part, mode)
            first += packed.out_features


class PackedGatedLinear:
    """The gated half of an MLP (device.GatedLinear) by the kernels, if gate and up have one format."""

    def __init__(
        self,
        library: KernelLibrary,
        gate: HostTensor,
        up: HostTensor,
        *,
        gate_bias: HostTensor | None,
        up_bias: HostTensor | None,
        num_threads: int,
    ) -> None:
        self._library = library
        self._formats = gate.format, up.format
        self._biases = gate_bias, up_bias
        biases = None if gate_bias is None or up_bias is None else [gate_bias.to_float32(), up_bias.to_float32()]
        if packed_format(gate) != packed_format(up):
            gate, up = HostTensor.of(gate.to_float32()), HostTensor.of(up.to_float32())
        self._packed = pack_gated(library, [gate, up], biases, threads=num_threads)

    def __call__(self, x: Array) -> Array:
        y = x.program.array(x.rows, self._packed.out_features)
        activations = _Activations(self._library, x).for_format(self._packed.format)
        _record_product(self._packed, activations, y.columns(0, y.width), Mode.GATED)
        return y

    def unpack(self) -> list[Part]:
        matrices = unpack(self._library, self._packed)
        return [
            (_in_format(HostTensor.of(matrix), format), bias)
            for matrix, format, bias in zip(matrices, self._formats, self._biases, strict=True)
        ]


def _pack(library: KernelLibrary, parts: list[Part], num_threads: int) -> PackedWeights:
    biases = [bias.to_float32() for _, bias in parts if bias is not None]
    return pack(library, [weight for weight, _ in parts], biases or None, threads=num_threads)


def _in_format(values: HostTensor, format: str) -> HostTensor:
    """Unpacked values in the format that they had; blocks stay values."""
    return values if values.has_blocks or format not in ("float32", "bfloat16", "float16") else values.astype(format)


class _Activations:
    """What the products of one input take: itself, or integers that are written once for all products."""

    def __init__(self, library: KernelLibrary, x: Array) -> None:
        self._library = library
        self._x = x
        self._quantized: dict[int, Array] = {}  # by the bytes of a row: the two kinds differ in them

    def for_format(self, format: str) -> Array:
        x = self._x
        if not needs_quantized_activations(format):
            return x
        row_bytes = activation_bytes(self._library, format, x.width)
        if row_bytes not in self._quantized:
            y = x.program.array(x.rows, row_bytes, dtype=np.uint8)
            job = QuantizeJob(in_features=x.width, format=FORMATS.index(format), rows=x.rows)
            x.program.append("quantize", job, {"x": x, "y": y})
            self._quantized[row_bytes] = y
        return self._quantized[row_bytes]


def _record_product(packed: PackedWeights, activations: Array, y: Columns, mode: Mode) -> None:
    job = LinearJob(
        weights=packed.blocks.ctypes.data,
        bias=None if packed.bias is None else packed.bias.ctypes.data,
        in_features=packed.in_features,
        out_features=packed.out_features,
        y_stride=y.array.width,
        format=packed.format_id,
        mode=mode,
        rows=y.array.rows,
    )
    y.array.program.append("linear", job, {"x": activations, "y": y}, keeps=(packed,))
