"""Adapters as ops of a program (devices.adapters.StepAdapters): by the kernels, or in numpy."""

import ctypes
from functools import partial
from typing import Any

import numpy as np

from headwater.devices.cpu.adapters.memory import CpuAdapters
from headwater.devices.cpu.kernel_library import TOKENS
from headwater.devices.cpu.packed_weights import BLOCK_COLS
from headwater.devices.cpu.plain.linear import Floats, gated
from headwater.devices.cpu.program import Array, Program, StepArrays
from headwater.devices.device import ACTIVATIONS, Activation

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


class AdapterColumns(ctypes.Structure):
    """`AdapterColumns` of kernels/linear/adapters.c: where the outputs of a projection lie."""

    _fields_ = (("first_column", _INT64), ("column_step", _INT64), ("out_features", _INT64))


class AdapterShrinkJob(ctypes.Structure):
    """`AdapterShrinkJob` of kernels/linear/adapters.c: x A^T of the rows with adapters."""

    _fields_ = (
        ("inputs", _POINTER),
        ("x", _POINTER),
        ("s", _POINTER),
        ("in_features", _INT64),
        ("width", _INT64),
        ("format", _INT64),
    )


class AdapterExpandJob(ctypes.Structure):
    """`AdapterExpandJob` of kernels/linear/adapters.c: y += scale * s B^T."""

    _fields_ = (
        ("outputs", _POINTER),
        ("columns", _POINTER),
        ("s", _POINTER),
        ("y", _POINTER),
        ("num_projections", _INT64),
        ("num_blocks", _INT64),
        ("width", _INT64),
        ("y_stride", _INT64),
        ("format", _INT64),
    )


class MultiplyHalvesJob(ctypes.Structure):
    """`MultiplyHalvesJob` of kernels/linear/adapters.c: y = activation(gate) * up, in steps with adapters."""

    _fields_ = (("halves", _POINTER), ("y", _POINTER), ("size", _INT64), ("activation", _INT64))


class RecordedAdapters:
    """Records what applies a memory's adapters to the products of one program."""

    def __init__(self, program: Program, memory: CpuAdapters) -> None:
        self._program = program
        self._memory = memory

    def add(self, site: str, layer: int, x: Array, y: Array) -> None:
        sizes = self._memory.shape.sites[site][1]
        firsts = np.cumsum([0, *sizes[:-1]]).tolist()
        columns = [AdapterColumns(first, BLOCK_COLS, size) for first, size in zip(firsts, sizes, strict=True)]
        self._record(site, layer, x, y, columns)

    def gated(self, layer: int, linear: Any, x: Array) -> Array:
        y, halves = linear.with_halves(x)
        size = y.width
        if self._memory.library is None:
            columns = [AdapterColumns(0, BLOCK_COLS, size), AdapterColumns(size, BLOCK_COLS, size)]
        else:
            columns = [AdapterColumns(first, 2 * BLOCK_COLS, size) for first in (0, BLOCK_COLS)]
        self._record("gate_up", layer, x, halves, columns)
        job = MultiplyHalvesJob(size=size, activation=ACTIVATIONS.index(linear.activation))
        plain = partial(_multiply_halves, activation=linear.activation)
        self._program.append("multiply_halves", job, {"halves": halves, "y": y}, plain=plain)
        return y

    def _record(self, site: str, layer: int, x: Array, y: Array, columns: list[AdapterColumns]) -> None:
        assert x.rows == y.rows == TOKENS
        memory, place = self._memory, (layer, site)
        if memory.library is None:
            plain = partial(_add, memory=memory, place=place, columns=columns)
            self._program.append("adapter", None, {"x": x, "y": y}, plain=plain)
            return
        num_in, table = memory.shape.sites[site][0], (AdapterColumns * len(columns))(*columns)
        num_rows = len(columns) * (memory.shape.max_rank + memory.shape.max_rank % 2)
        width = -(-num_rows // BLOCK_COLS) * BLOCK_COLS
        s = self._program.array(TOKENS, width)
        shrink = AdapterShrinkJob(
            inputs=ctypes.addressof(memory.inputs[place]), in_features=num_in, width=width, format=memory.format_id
        )
        self._program.append("adapter_shrink", shrink, {"x": x, "s": s}, keeps=(memory,))
        expand = AdapterExpandJob(
            outputs=ctypes.addressof(memory.outputs[place]),
            columns=ctypes.addressof(table),
            num_projections=len(columns),
            num_blocks=sum(-(-it.out_features // BLOCK_COLS) for it in columns),
            width=width,
            y_stride=y.width,
            format=memory.format_id,
        )
        self._program.append("adapter_expand", expand, {"s": s, "y": y}, keeps=(memory, table))


# --- the same in numpy (program.Plain) ---------------------------------------------------------------


def _add(
    step: StepArrays,
    *,
    x: Floats,
    y: Floats,
    memory: CpuAdapters,
    place: tuple[int, str],
    columns: list[AdapterColumns],
) -> None:
    for slot, first, count in step.adapter_tiles.tolist():
        adapter = memory.adapter(slot)
        if adapter is None:  # as of a step that only warms up
            continue
        rows = step.adapter_rows[first : first + count]
        for index, each in adapter.at(*place):
            at = columns[index].first_column
            product = (x[rows] @ each.a.to_float32().T) @ each.b.to_float32().T
            y[rows, at : at + columns[index].out_features] += np.float32(each.scale) * product


def _multiply_halves(step: StepArrays, *, halves: Floats, y: Floats, activation: Activation) -> None:
    if len(step.adapter_tiles):
        y[:] = gated(halves[:, : y.shape[1]], halves[:, y.shape[1] :], activation)


