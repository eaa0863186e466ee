"""The attention of a CPU's model: called by a model's layers, it records ops (program.py)."""

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.attention_kernels import (
    KV_DTYPES,
    AttentionJob,
    RotaryAnglesJob,
    SquareSumsJob,
    check_geometry,
    partial_arrays,
)
from headwater.devices.cpu.kernel_library import TOKENS
from headwater.devices.cpu.plain.attention import StepRows, attend, prepare_qkv
from headwater.devices.cpu.plain.kv_pages import LayerPages
from headwater.devices.cpu.plain.norm import Floats, rotary_angles
from headwater.devices.cpu.program import Array, Program, StepArrays
from headwater.devices.cpu.ranks.group import CpuRanks
from headwater.devices.cpu.ranks.ops import all_reduce
from headwater.devices.cpu.row_ops import norm_weight
from headwater.devices.device import AttentionGeometry, RotaryAngles, SharedNorm
from headwater.devices.host_tensor import HostTensor
from headwater.devices.kv_memory import KVLayout


class RecordedAttention:
    """device.StepAttention of every step that the program will run, over KV pages of one layout."""

    def __init__(
        self,
        program: Program,
        geometry: AttentionGeometry,
        layout: KVLayout,
        *,
        rotary: Sequence[RotaryAngles],
        ranks: CpuRanks | None = None,
    ) -> None:
        """`ranks` is needed where they share the QK-norm."""
        check_geometry(num_heads=geometry.num_heads, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim)
        self._program = program
        self._ranks = ranks
        self._geometry = geometry
        self._layout = layout
        self._partials = partial_arrays(
            num_heads=geometry.num_heads, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim
        )
        self._pair_order = geometry.pair_order()
        self._rotary = [_record_angles(program, each) for each in rotary]

    def __call__(
        self,
        qkv: Array,
        layer: int,
        q_norm: HostTensor | None,
        k_norm: HostTensor | None,
        sinks: HostTensor | None = None,
    ) -> Array:
        shape, layout = self._geometry, self._layout
        sink_scores = None if sinks is None else np.ascontiguousarray(sinks.to_float32())
        offset, window = shape.norm_offset, shape.layer(layer).window
        norms = [None if norm is None else norm_weight(norm, offset=offset) for norm in (q_norm, k_norm)]
        out = self._program.array(TOKENS, shape.num_heads * shape.head_dim)
        job = AttentionJob(
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            kv_dtype=KV_DTYPES.index(layout.dtype),
            page_size=layout.page_size,
            page_bytes=layout.page_bytes,
            layer_offset=layer * layout.layer_bytes,
            norm_eps=shape.norm_eps,
            scale=shape.scale,
            q_norm=_address(norms[0]),
            k_norm=_address(norms[1]),
            norms_whole=shape.norms_whole,
            pair_order=_address(self._pair_order),
            window=window or 0,
            sinks=_address(sink_scores),
            **{name: array.ctypes.data for name, array in self._partials.items()},
        )
        keeps = (*norms, sink_scores, self._pair_order, *self._partials.values())
        pages = partial(_layer_pages, layout=layout, layer=layer)
        prepare = partial(
            _prepare_qkv,
            pages=pages,
            norms=norms,
            norm_eps=shape.norm_eps,
            norms_whole=shape.norms_whole,
            num_normed=None if shape.shared_norm is None else shape.shared_norm.num_normed(shape),
            pair_order=self._pair_order,
        )
        cos, sin = self._rotary[shape.layer(layer).rotary]
        rotated = {"qkv": qkv, "cos": cos, "sin": sin}
        if shape.shared_norm is not None:
            rotated["squares"] = self._sum_squares(qkv, shape.shared_norm)
            job.num_normed[:] = shape.shared_norm.num_normed(shape)
        self._program.append("prepare_qkv", job, rotated, plain=prepare, keeps=keeps)
        attend_plainly = partial(_attend, pages=pages, scale=job.scale, window=window, sinks=sink_scores)
        self._program.append("attention", job, {"qkv": qkv, "out": out}, plain=attend_plainly)
        return out

    def _sum_squares(self, qkv: Array, norm: SharedNorm) -> Array:
        """Record each token's sums of squares over the ranks, of queries and of keys. float32[T, 2]"""
        assert self._ranks is not None
        shape = self._geometry
        squares = self._program.array(TOKENS, 2)
        first_key, counted = shape.num_heads * shape.head_dim, norm.num_counted(shape)
        job = SquareSumsJob(stride=qkv.width, first_key=first_key, num_counted=(ctypes.c_int64 * 2)(*counted))
        plain = partial(_square_sums, first_key=first_key, counted=counted)
        self._program.append("square_sums", job, {"qkv": qkv, "squares": squares}, plain=plain)
        return all_reduce(squares, self._ranks)


def _record_angles(program: Program, rotary: RotaryAngles) -> tuple[Array, Array]:
    """cos and sin of the step's tokens, [T, pairs]."""
    inv_freq = np.ascontiguousarray(rotary.inv_freq, dtype=np.float32)
    half = len(inv_freq)
    cos, sin = program.array(TOKENS, half), program.array(TOKENS, half)
    program.append(
        "rotary_angles",
        RotaryAnglesJob(inv_freq=inv_freq.ctypes.data, half=half, factor=rotary.factor),
        {"cos": cos, "sin": sin},
        plain=partial(_rotary_angles, rotary=rotary),
        keeps=(inv_freq,),
    )
    return cos, sin


def _address(array: npt.NDArray | None) -> int | None:
    return None if array is None else array.ctypes.data


# --- the same in numpy (program.Plain) ---------------------------------------------------------------


def _rotary_angles(step: StepArrays, *, cos: Floats, sin: Floats, rotary: RotaryAngles) -> None:
    cos[:], sin[:] = rotary_angles(step.positions, rotary)


def _layer_pages(step: StepArrays, *, layout: KVLayout, layer: int) -> LayerPages:
    return LayerPages(
        memory=step.kv,
        layer_offset=layer * layout.layer_bytes,
        num_kv_heads=layout.num_kv_heads,
        page_size=layout.page_size,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
    )


def _rows(step: StepArrays) -> StepRows:
    return StepRows(step.query_starts, step.context_lens, step.page_tables, step.positions)


def _prepare_qkv(
    step: StepArrays, *, qkv: Floats, cos: Floats, sin: Floats, pages: partial[LayerPages], norms: list, **options: Any
) -> None:
    q_norm, k_norm = norms
    prepare_qkv(qkv, _rows(step), pages(step), cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm, **options)


def _square_sums(_: StepArrays, *, qkv: Floats, squares: Floats, first_key: int, counted: tuple[int, int]) -> None:
    for which, first in enumerate((0, first_key)):
        squares[:, which] = np.square(qkv[:, first : first + counted[which]]).sum(axis=-1, dtype=np.float32)


def _attend(step: StepArrays, *, qkv: Floats, out: Floats, pages: partial[LayerPages], **options: Any) -> None:
    out[:] = attend(qkv, _rows(step), pages(step), **options)
