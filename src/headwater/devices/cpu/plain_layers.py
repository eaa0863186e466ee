"""The layers of a CPU without kernels: called with a program's arrays, they record ops that compute in numpy.

Weights stay in the format that they were placed in, and are widened a block of rows at a time.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from headwater.devices.cpu.kernel_library import TOKENS
from headwater.devices.cpu.plain.linear import gated as activated
from headwater.devices.cpu.plain.linear import linear
from headwater.devices.cpu.plain.norm import Floats
from headwater.devices.cpu.program import Array, Plain, StepArrays, TokenIds
from headwater.devices.device import Activation, Layer
from headwater.devices.host_tensor import HostTensor, joined_rows

Part = tuple[HostTensor, HostTensor | None]  # weight [out, in] and bias [out]

_WIDE_NUMBERS = 1 << 20  # of a weight in float32 at a time


class PlainLinear:
    """A linear layer (device.Linear) in numpy."""

    def __init__(self, weights: Sequence[HostTensor], biases: Sequence[HostTensor] | None = None) -> None:
        self._parts: list[Part] = list(zip(weights, biases or [None] * len(weights), strict=True))
        self.out_features = sum(weight.shape[0] for weight in weights)
        self.in_features = weights[0].shape[1]

    def __call__(self, x: Array, *, reader: Layer | None = None) -> Array:
        y = x.program.array(x.rows, self.out_features)
        x.program.append("linear", None, {"x": x, "y": y}, plain=partial(_store, parts=self._parts))
        return y

    def add_to(self, residual: Array, x: Array) -> None:
        x.program.append("linear", None, {"x": x, "y": residual}, plain=partial(_add, parts=self._parts))

    def logits(self, x: Array, out: None = None) -> Array:
        assert out is None, "a program has the memory of its arrays"
        return self(x)

    def embed(self, token_ids: TokenIds, *, first_token: int | None = None, scale: float = 1.0) -> Array:
        ((weight, _),) = self._parts
        y = token_ids.program.array(TOKENS, self.in_features)
        embed = partial(_embed, weight=weight, first_token=first_token or 0, scale=np.float32(scale))
        token_ids.program.append("embed", None, {"y": y}, plain=embed)
        return y

    def unpack(self) -> list[Part]:
        return self._parts


class PlainGatedLinear:
    """The gated half of an MLP (device.GatedLinear) in numpy."""

    def __init__(self, gate: Part, up: Part, *, activation: Activation = "silu", is_fused: bool = False) -> None:
        """`is_fused`: it unpacks to one matrix."""
        self._parts = [gate, up]
        self.activation: Activation = activation
        self._is_fused = is_fused

    def __call__(self, x: Array, *, reader: Layer | None = None) -> Array:
        y = x.program.array(x.rows, self._parts[0][0].shape[0])
        gated = partial(_gated, gate=self._parts[0], up=self._parts[1], activation=self.activation)
        x.program.append("linear", None, {"x": x, "y": y}, plain=gated)
        return y

    def with_halves(self, x: Array) -> tuple[Array, Array]:
        """As PackedGatedLinear's; gate and up lie one behind the other."""
        size = self._parts[0][0].shape[0]
        y, halves = x.program.array(x.rows, size), x.program.array(x.rows, 2 * size)
        gated = partial(_gated, gate=self._parts[0], up=self._parts[1], activation=self.activation)
        x.program.append("linear", None, {"x": x, "y": y}, plain=partial(_if_adapters, gated, wanted=False))
        store = partial(_store, parts=self._parts)
        x.program.append("linear", None, {"x": x, "y": halves}, plain=partial(_if_adapters, store, wanted=True))
        return y, halves

    def unpack(self) -> list[Part]:
        return [(joined_rows([weight for weight, _ in self._parts]), None)] if self._is_fused else self._parts


# --- in numpy (program.Plain) ------------------------------------------------------------------------


def _products(x: Floats, parts: Sequence[Part]) -> Iterator[tuple[slice, Floats]]:
    """Columns of the result, and their numbers."""
    first = 0
    for weight, bias in parts:
        biases = None if bias is None else bias.to_float32()
        step = max(1, _WIDE_NUMBERS // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            end = min(start + step, weight.shape[0])
            some = None if biases is None else biases[start:end]
            yield slice(first + start, first + end), linear(x, weight.rows(start, end).to_float32(), some)
        first += weight.shape[0]


def _store(_: StepArrays, *, x: Floats, y: Floats, parts: Sequence[Part]) -> None:
    for columns, product in _products(x, parts):
        y[:, columns] = product


def _add(_: StepArrays, *, x: Floats, y: Floats, parts: Sequence[Part]) -> None:
    for columns, product in _products(x, parts):
        y[:, columns] += product


def _gated(_: StepArrays, *, x: Floats, y: Floats, gate: Part, up: Part, activation: Activation) -> None:
    lefts, rights = _products(x, [gate]), _products(x, [up])
    for (columns, left), (_same, right) in zip(lefts, rights, strict=True):
        y[:, columns] = activated(left, right, activation)


def _if_adapters(plain: Plain, step: StepArrays, *, wanted: bool, **arrays: Floats) -> None:
    """`plain` in the steps that have rows with adapters, or in the others."""
    if (len(step.adapter_tiles) > 0) == wanted:
        plain(step, **arrays)


def _embed(step: StepArrays, *, y: Floats, weight: HostTensor, first_token: int, scale: np.float32) -> None:
    rows = step.token_ids - first_token
    is_here = (rows >= 0) & (rows < weight.shape[0])
    y[is_here] = weight.take_rows(rows[is_here]).to_float32() * scale
    y[~is_here] = 0
