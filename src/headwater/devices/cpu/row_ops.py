"""Ops of a CPU program on whole rows, with and without kernels: norm, choice of rows, the most probable token."""

from functools import partial
from typing import NamedTuple

import numpy as np

from headwater.devices.cpu.attention_kernels import ArgmaxJob, RmsNormJob, SelectRowsJob
from headwater.devices.cpu.kernel_library import SELECTED
from headwater.devices.cpu.plain import draw as plain_draw
from headwater.devices.cpu.plain import norm as plain_norm
from headwater.devices.cpu.plain.norm import Floats
from headwater.devices.cpu.program import Array, Numbers, StepArrays
from headwater.devices.host_tensor import HostTensor


def rms_norm(x: Array, weight: HostTensor, eps: float, *, offset: float = 0.0, scale: float = 1.0) -> Array:
    """Record y = x / rms(x) * (weight + offset) * scale."""
    y = x.program.array(x.rows, x.width)
    wide = norm_weight(weight, offset=offset, scale=scale)
    job = RmsNormJob(weight=wide.ctypes.data, size=x.width, eps=eps, rows=x.rows)
    x.program.append("rms_norm", job, {"x": x, "y": y}, plain=partial(_rms_norm, weight=wide, eps=eps), keeps=(wide,))
    return y


def add_rms_norm(residual: Array, x: Array, weight: HostTensor, eps: float, *, offset: float = 0.0) -> None:
    """Record residual += x / rms(x) * (weight + offset)."""
    wide = norm_weight(weight, offset=offset)
    job = RmsNormJob(weight=wide.ctypes.data, size=x.width, eps=eps, rows=x.rows)
    plain = partial(_add_rms_norm, weight=wide, eps=eps)
    x.program.append("add_rms_norm", job, {"x": x, "y": residual}, plain=plain, keeps=(wide,))


def norm_weight(weight: HostTensor, *, offset: float = 0.0, scale: float = 1.0) -> Floats:
    """What a norm multiplies by, as kernels read it: float32[size]."""
    wide = weight.to_float32()
    if (offset, scale) != (0.0, 1.0):
        wide = (wide + np.float32(offset)) * np.float32(scale)
    return np.ascontiguousarray(wide)


def select_rows(x: Array) -> Array:
    """Record the copy of the rows whose logits the step wants."""
    y = x.program.array(SELECTED, x.width)
    x.program.append("select_rows", SelectRowsJob(size=x.width), {"x": x, "y": y}, plain=_select_rows)
    return y


class MostProbable(NamedTuple):
    """Of each selected row, [S, 1]."""

    tokens: Array  # int32
    logits: Array  # float32
    are_finite: Array  # uint8: whether all logits of the row are


def argmax(logits: Array) -> MostProbable:
    """Record the choice of the most probable token of each selected row."""
    found = MostProbable(*(logits.program.array(SELECTED, 1, dtype=it) for it in (np.int32, np.float32, np.uint8)))
    arrays = {"logits": logits, "tokens": found.tokens, "values": found.logits, "is_finite": found.are_finite}
    logits.program.append("argmax", ArgmaxJob(cols=logits.width, num_rows=-1), arrays, plain=_argmax)
    return found


# --- the same in numpy (program.Plain) ---------------------------------------------------------------


def _rms_norm(_: StepArrays, *, x: Floats, y: Floats, weight: Floats, eps: float) -> None:
    y[:] = plain_norm.rms_norm(x, weight, eps)


def _add_rms_norm(_: StepArrays, *, x: Floats, y: Floats, weight: Floats, eps: float) -> None:
    y[:] += plain_norm.rms_norm(x, weight, eps)


def _select_rows(step: StepArrays, *, x: Floats, y: Floats) -> None:
    y[:] = x[step.selected]


def _argmax(_: StepArrays, *, logits: Floats, tokens: Numbers, values: Floats, is_finite: Numbers) -> None:
    tokens[:, 0], is_finite[:, 0] = plain_draw.argmax(logits)
    values[:] = np.take_along_axis(logits, tokens.astype(np.int64), axis=1)
