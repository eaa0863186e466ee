"""The attention of a CPU's model: called by a model's layers, it records ops (program.py)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu.attention_kernels import (
    KV_DTYPES,
    AttentionJob,
    RotaryAnglesJob,
    check_geometry,
    partial_arrays,
)
from headwater.devices.cpu.kernel_library import TOKENS
from headwater.devices.cpu.plain.attention import StepRows, attend, prepare_qkv
from headwater.devices.cpu.plain.kv_pages import LayerPages
from headwater.devices.cpu.plain.norm import Floats, rotary_angles
from headwater.devices.cpu.program import Array, Program, StepArrays
from headwater.devices.cpu.row_ops import norm_weight
from headwater.devices.device import AttentionGeometry, RotaryAngles
from headwater.devices.host_tensor import HostTensor
from headwater.devices.kv_memory import KVLayout


class RecordedAttention:
    """device.StepAttention of every step that the program will run, over KV pages of one layout."""

    def __init__(
        self, program: Program, geometry: AttentionGeometry, layout: KVLayout, *, rotary: Sequence[RotaryAngles]
    ) -> None:
        check_geometry(num_heads=geometry.num_heads, num_kv_heads=geometry.num_kv_heads, head_dim=geometry.head_dim)
        self._program = program
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
            pair_order=self._pair_order,
        )
        cos, sin = self._rotary[shape.layer(layer).rotary]
        rotated = {"qkv": qkv, "cos": cos, "sin": sin}
        self._program.append("prepare_qkv", job, rotated, plain=prepare, keeps=keeps)
        attend_plainly = partial(_attend, pages=pages, scale=job.scale, window=window, sinks=sink_scores)
        self._program.append("attention", job, {"qkv": qkv, "out": out}, plain=attend_plainly)
        return out


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
    cos[:], sin[:] = rotary_angles(step.positions, rotary.inv_freq, rotary.factor)


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


def _attend(step: StepArrays, *, qkv: Floats, out: Floats, pages: partial[LayerPages], **options: Any) -> None:
    out[:] = attend(qkv, _rows(step), pages(step), **options)
