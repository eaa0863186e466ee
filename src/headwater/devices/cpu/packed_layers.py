"""The layers of a CPU with kernels: called with a program's arrays, they record products with packed weights.

Matrices of one format that follow each other become one product; others fill columns of the same rows.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from headwater.devices.cpu.kernel_library import TOKENS, KernelLibrary
from headwater.devices.cpu.linear_kernels import EmbedJob, LinearJob, Mode, QuantizeJob
from headwater.devices.cpu.packed_weights import (
    BLOCK_COLS,
    FORMATS,
    PackedWeights,
    activation_bytes,
    converts_activations,
    pack,
    pack_gated,
    packed_format,
    unpack,
)
from headwater.devices.cpu.program import Array, Columns, Op, TokenIds
from headwater.devices.device import ACTIVATIONS, Activation, Layer
from headwater.devices.host_tensor import HostTensor, joined_rows

Part = tuple[HostTensor, HostTensor | None]
_GROUP = 32  # of kernels/linear/packed.h


@dataclass(frozen=True, slots=True, eq=False)
class RowsForm:
    """What unpacking needs to know of one matrix of a layer: its rows, its format and its bias before packing."""

    num_rows: int
    format: str
    bias: HostTensor | None

    @classmethod
    def of(cls, weight: HostTensor, bias: HostTensor | None) -> "RowsForm":
        return cls(weight.shape[0], weight.format, bias)


class PackedLinear:
    """A linear layer (device.Linear) by the kernels."""

    def __init__(self, library: KernelLibrary, packed: Sequence[PackedWeights], *, rows: Sequence[RowsForm]) -> None:
        """`packed` hold the matrices of `rows`, one after another."""
        self._library = library
        self.packed = packed
        self.rows = rows
        self.in_features = packed[0].in_features
        self.out_features = sum(part.num_rows for part in rows)

    @classmethod
    def of(
        cls,
        library: KernelLibrary,
        weights: Sequence[HostTensor],
        biases: Sequence[HostTensor] | None = None,
        *,
        num_threads: int,
    ) -> "PackedLinear":
        parts = list(zip(weights, biases or [None] * len(weights), strict=True))
        groups = [list(group) for _, group in groupby(parts, key=lambda part: packed_format(part[0]))]
        packed = [_pack(library, group, num_threads) for group in groups]
        return cls(library, packed, rows=[RowsForm.of(*part) for part in parts])

    def __call__(self, x: Array, *, reader: Layer | None = None) -> Array:
        y = x.program.array(x.rows, self.out_features)
        self._record(x, y, Mode.STORE)
        return y

    def add_to(self, residual: Array, x: Array) -> None:
        self._record(x, residual, Mode.ADD)

    def logits(self, x: Array, out: None = None) -> Array:
        assert out is None, "a program has the memory of its arrays"
        return self(x)

    def embed(self, token_ids: TokenIds, *, first_token: int | None = None, scale: float = 1.0) -> Array:
        (packed,) = self.packed
        y = token_ids.program.array(TOKENS, self.in_features)
        job = EmbedJob(
            weights=packed.blocks.ctypes.data,
            in_features=self.in_features,
            format=packed.format_id,
            first_token=first_token or 0,
            num_tokens=self.out_features,
            scale=scale,
        )
        token_ids.program.append("embed", job, {"y": y}, keeps=(packed,))
        return y

    def unpack(self) -> list[Part]:
        matrices = [matrix for packed in self.packed for matrix in unpack(self._library, packed)]
        parts, whole, first = [], matrices.pop(0), 0
        for part in self.rows:
            if first == len(whole):
                whole, first = matrices.pop(0), 0
            parts.append((in_format(HostTensor.of(whole[first : first + part.num_rows]), part.format), part.bias))
            first += part.num_rows
        return parts

    def _record(self, x: Array, y: Array, mode: Mode) -> None:
        activations, first = _Activations(self._library, x), 0
        for packed in self.packed:
            part = y.columns(first, packed.out_features)
            _record_product(packed, activations.for_format(packed.format), part, mode)
            first += packed.out_features


class PackedGatedLinear:
    """The gated half of an MLP (device.GatedLinear) by the kernels, if gate and up have one format."""

    def __init__(
        self,
        library: KernelLibrary,
        packed: PackedWeights,
        *,
        rows: Sequence[RowsForm],
        activation: Activation = "silu",
        is_fused: bool = False,
    ) -> None:
        """`packed` holds gate and up, whose forms are `rows`. `is_fused`: they unpack to one matrix."""
        self._library = library
        self.packed = (packed,)
        self.rows = rows
        self.activation: Activation = activation
        self._is_fused = is_fused

    @classmethod
    def of(
        cls,
        library: KernelLibrary,
        gate: HostTensor,
        up: HostTensor,
        *,
        gate_bias: HostTensor | None,
        up_bias: HostTensor | None,
        num_threads: int,
        activation: Activation = "silu",
        is_fused: bool = False,
    ) -> "PackedGatedLinear":
        rows = [RowsForm.of(gate, gate_bias), RowsForm.of(up, up_bias)]
        biases = None if gate_bias is None or up_bias is None else [gate_bias.to_float32(), up_bias.to_float32()]
        if packed_format(gate) != packed_format(up):
            gate, up = HostTensor.of(gate.to_float32()), HostTensor.of(up.to_float32())
        packed = pack_gated(library, [gate, up], biases, threads=num_threads)
        return cls(library, packed, rows=rows, activation=activation, is_fused=is_fused)

    def __call__(self, x: Array, *, reader: Layer | None = None) -> Array:
        (packed,) = self.packed
        y = x.program.array(x.rows, packed.out_features)
        activations = _Activations(self._library, x).for_format(packed.format)
        _record_product(packed, activations, y.columns(0, y.width), Mode.GATED, activation=self.activation)
        return y

    def with_halves(self, x: Array) -> tuple[Array, Array]:
        """Record the layer for steps without adapters, and its two products for steps with some.

        Returns y, which the caller has to fill in steps with adapters, and gate and up in turn, 16 columns each.
        """
        (packed,) = self.packed
        y = x.program.array(x.rows, packed.out_features)
        halves = x.program.array(x.rows, len(packed.blocks) * BLOCK_COLS)
        activations = _Activations(self._library, x).for_format(packed.format)
        gated = y.columns(0, y.width)
        kernel = "linear_without_adapters"
        _record_product(packed, activations, gated, Mode.GATED, kernel=kernel, activation=self.activation)
        _record_product(packed, activations, halves.columns(0, halves.width), Mode.STORE, kernel="linear_with_adapters")
        return y, halves

    def unpack(self) -> list[Part]:
        (packed,) = self.packed
        parts = [
            (in_format(HostTensor.of(matrix), part.format), part.bias)
            for matrix, part in zip(unpack(self._library, packed), self.rows, strict=True)
        ]
        return [(joined_rows([weight for weight, _ in parts]), None)] if self._is_fused else parts


def _pack(library: KernelLibrary, parts: list[Part], num_threads: int) -> PackedWeights:
    biases = [bias.to_float32() for _, bias in parts if bias is not None]
    return pack(library, [weight for weight, _ in parts], biases or None, threads=num_threads)


def in_format(values: HostTensor, format: str) -> HostTensor:
    """Unpacked values in the format that they had; blocks stay values."""
    return values if values.has_blocks or format not in ("float32", "bfloat16", "float16") else values.astype(format)


class _Activations:
    """What the products of one input take: itself, or what is made of it once for all products."""

    def __init__(self, library: KernelLibrary, x: Array) -> None:
        self._library = library
        self._x = x
        self._converted: dict[tuple[int, bool], Array] = {}  # by the bytes of a row, and whether for bfloat16 weights

    def for_format(self, format: str) -> Array:
        x = self._x
        if not converts_activations(self._library, format):
            return x
        row_bytes = activation_bytes(self._library, format, x.width)
        kind = (row_bytes, format == "bfloat16")
        if kind not in self._converted:
            y = x.program.array(x.rows, row_bytes, dtype=np.uint8)
            job = QuantizeJob(in_features=x.width, format=FORMATS.index(format), rows=x.rows)
            x.program.append("quantize", job, {"x": x, "y": y})
            self._converted[kind] = y
        return self._converted[kind]


def _record_product(
    packed: PackedWeights,
    activations: Array,
    y: Columns,
    mode: Mode,
    *,
    kernel: str = "linear",
    activation: Activation = "silu",
) -> None:
    job = LinearJob(
        weights=packed.blocks.ctypes.data,
        bias=None if packed.bias is None else packed.bias.ctypes.data,
        in_features=packed.in_features,
        out_features=y.width,
        y_stride=y.array.width,
        format=packed.format_id,
        mode=mode,
        activation=ACTIVATIONS.index(activation),
        rows=y.array.rows,
    )
    y.array.program.append(kernel, job, {"x": activations, "y": y}, keeps=(packed,))


def fuse_activations(ops: Sequence[Op], kept: set[Array]) -> list[Op]:
    """The ops of a program, of which some write activations in place of their results. Changes their jobs.

    With AMX, norms and gated products round prompts' rows for the products that alone read them. Otherwise `quantize`
    would read the rows once more. Rows of decodes take the usual way.
    """
    users: dict[Array, list[int]] = {}
    for index, op in enumerate(ops):
        for array in op.whole_arrays():
            users.setdefault(array, []).append(index)
    fused = list(ops)
    for array, indices in users.items():
        if len(indices) != 2 or array in kept or array.rows != TOKENS or array.width % _GROUP:
            continue
        producer, reader = (ops[index] for index in indices)
        if not isinstance(reader.job, QuantizeJob) or not _can_write(producer, array):
            continue
        assert producer.job is not None
        producer.job.activation_format = reader.job.format
        reader.job.only_decodes = 1
        arrays = {**producer.arrays, "activations": reader.arrays["y"]}
        fused[indices[0]] = replace(producer, arrays=arrays)
    return fused


def _can_write(op: Op, array: Array) -> bool:
    """Whether `op` makes the array, and is of a kind that writes activations."""
    job: ctypes.Structure | None = op.job
    if op.kernel == "rms_norm":
        return op.arrays["y"] is array
    is_gated = (
        isinstance(job, LinearJob) and job.mode == Mode.GATED and FORMATS[job.format] not in ("float32", "float16")
    )
    y = op.arrays.get("y")
    return is_gated and y is not None and not isinstance(y, Array) and y.array is array and y.width == array.width
