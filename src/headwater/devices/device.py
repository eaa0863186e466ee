"""What models and runners need of a device: two protocols, which cpu/device.py and cuda/device.py implement.

Shape letters: T tokens of a step, R rows (requests) of a step, H query heads, G KV heads, D head_dim.
An array of a GPU holds numbers, which are there when its kernels have run. An array of a CPU stands for numbers of
every step to come: there the model's code runs once, and records a program (cpu/program.py).
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from headwater.devices.host_tensor import HostTensor, RandomTensor
from headwater.devices.kv_memory import KVLayout, KVMemory
from headwater.devices.rank_group import RankGroup
from headwater.devices.scaled_tensor import ScaledTensor

Array = Any  # a device's own array: shared code passes it on, and does not look into it
# a device's own Linear, GatedLinear, Experts or StepAttention. A `reader` alone reads a result (Experts: besides their
# router), before anything else is computed; it may get the result in a form that only the two know.
Layer = Any


class Linear(Protocol):
    """y = x W^T + b with W in whatever form suits the device. Activations [T, features] have the device's dtype."""

    in_features: int
    out_features: int

    def __call__(self, x: Array, *, reader: Layer | None = None) -> Array:
        """[T, in] -> [T, out], for `reader`."""
        ...

    def add_to(self, residual: Array, x: Array) -> None:
        """residual += x W^T + b. `residual` is float32[T, out]."""
        ...

    def logits(self, x: Array, out: Array | None = None) -> Array:
        """[T, in] -> float32[T, out], not rounded to the weight's dtype where the device can avoid it.

        If `out` is given, the result is written there, and `out` is returned.
        """
        ...

    def embed(self, token_ids: Array, *, first_token: int | None = None, scale: float = 1.0) -> Array:
        """Rows of W times `scale`, as an embedding looks them up: ids [T] -> float32[T, in].

        Row i is that of token `first_token` + i, and other tokens get zeros; None: every token has a row.
        """
        ...

    def unpack(self) -> Sequence[tuple[Array, Array | None]]:
        """W [out, in] and the bias [out] of each layer that was packed: views or copies, not to be changed."""
        ...


Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)  # by their number in kernels/simd/simd.h
# of gpt-oss: min(g, limit) sigmoid(slope * min(g, limit)) * (clamp(u, -limit, limit) + 1) in place of activation(g) * u
SWIGLU_LIMIT, SWIGLU_SLOPE = 7.0, 1.702


class GatedLinear(Protocol):
    """y = activation(x Wg^T + bg) * (x Wu^T + bu): the first half of a gated MLP (arXiv 2002.05202)."""

    def __call__(self, x: Array, *, reader: Layer | None = None) -> Array:
        """[T, in] -> [T, out], for `reader`."""
        ...

    def unpack(self) -> Sequence[tuple[Array, Array | None]]:
        """Wg and its bias, Wu and its bias."""
        ...


@dataclass(frozen=True, slots=True)
class Routing:
    """How a layer of experts chooses: the `per_token` largest logits, of equal ones the lower index first.

    Their weights are a softmax: over the chosen ones if `renormalises`, else over all experts.
    """

    per_token: int
    renormalises: bool


class Experts(Protocol):
    """Many gated MLPs, of which each token goes through a few (arXiv 1701.06538): the sum of their results by weight.

    An expert is activation(x Wg^T + bg) * (x Wu^T + bu) Wd^T + bd. The sum runs from a token's heaviest expert to its
    lightest.
    """

    def __call__(self, x: Array, logits: Array) -> Array:
        """x [T, in] and the router's logits float32[T, experts] -> [T, in]."""
        ...

    def add_to(self, residual: Array, x: Array, logits: Array) -> None:
        """Add the same to the residual, float32[T, in]."""
        ...

    def matrix(self, expert: int, which: int) -> Array:
        """Wg, Wu (0, 1: [inner, in]) or Wd (2: [in, inner]) of one expert: a view or a copy, not to be changed."""
        ...

    def bias(self, expert: int, which: int) -> Array:
        """bg, bu or bd of one expert of a layer with biases, likewise."""
        ...


ExpertBiases = Sequence[tuple[Array, Array, Array]]  # of gate, up and down of each expert


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What may differ from layer to layer."""

    rotary: int = 0  # which of the model's RotaryAngles
    window: int | None = None  # keys that a query sees, its own included; None: all before it


_EVERY_LAYER = LayerAttention()


@dataclass(frozen=True, slots=True)
class SharedNorm:
    """The heads of all ranks, whose QK-norm is of them together: it needs sums of squares over the ranks."""

    num_heads: int
    num_kv_heads: int
    counts_keys: bool  # False: another rank has the same KV heads, and adds up their squares

    def num_counted(self, geometry: "AttentionGeometry") -> tuple[int, int]:
        """How many numbers of this rank's queries and keys are in the sums."""
        dim = geometry.head_dim
        return geometry.num_heads * dim, self.counts_keys * geometry.num_kv_heads * dim

    def num_normed(self, geometry: "AttentionGeometry") -> tuple[int, int]:
        """How many numbers of all ranks' queries and keys the sums are of."""
        return self.num_heads * geometry.head_dim, self.num_kv_heads * geometry.head_dim


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """The shape of a model's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float  # of the QK-norm, where a model has one
    score_scale: float | None = None  # of queries times keys; None: head_dim ** -0.5
    layers: tuple[LayerAttention, ...] = ()  # empty: all are alike
    norm_offset: float = 0.0  # the QK-norm multiplies by its weight plus this
    norms_whole: bool = False  # the QK-norm is of all heads together: weights [H D] and [G D]
    shared_norm: SharedNorm | None = None  # where ranks share such a norm
    rotary_pairs: int | None = None  # only these are rotated, of dims (i, i + rotary_pairs); None: all D / 2
    is_interleaved: bool = False  # pair i is of dims (2i, 2i + 1)
    has_sinks: bool = False  # attention is called with sinks

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    def layer(self, index: int) -> LayerAttention:
        return self.layers[index] if self.layers else _EVERY_LAYER

    @property
    def has_windows(self) -> bool:
        return any(layer.window is not None for layer in self.layers)

    def pair_order(self) -> npt.NDArray[np.int32] | None:
        """The dims of a head in the order of pairs: the first ones of all pairs, then the second ones. int32[D].

        Prepared queries and keys have this order. None: it is the order that they have anyway.
        """
        half = self.head_dim // 2
        pair = np.arange(half, dtype=np.int32)
        if self.is_interleaved:
            return np.concatenate((2 * pair, 2 * pair + 1))
        num_pairs = half if self.rotary_pairs is None else self.rotary_pairs
        if num_pairs == half:
            return None
        is_rotated = pair < num_pairs
        first = np.where(is_rotated, pair, num_pairs + pair)
        second = np.where(is_rotated, pair + num_pairs, half + pair)
        return np.concatenate((first, second)).astype(np.int32)


@dataclass(frozen=True, slots=True)
class RotaryAngles:
    """Position p rotates pair i of a head by p * inv_freq[i]; cos and sin are multiplied by `factor`.

    Pairs whose frequency is zero stay as they are, without the factor: all of them in layers without positions.
    """

    inv_freq: npt.NDArray[np.float32]  # [D / 2]
    factor: float

    @property
    def factors(self) -> npt.NDArray[np.float32]:
        """What cos and sin of each pair are multiplied by. float32[D / 2]"""
        return np.where(self.inv_freq == 0, np.float32(1), np.float32(self.factor))


class StepAttention(Protocol):
    """The attention of one step. What all layers share has been prepared."""

    def __call__(
        self, qkv: Array, layer: int, q_norm: Array | None, k_norm: Array | None, sinks: Array | None = None
    ) -> Array:
        """Norm and rotate q and k, write k and v to their pages, attend causally through the page tables.

        `qkv` is [T, (H + 2G) D], may be overwritten; returns [T, H D] in the same dtype. `sinks` [H]: a score more in
        the softmax of each head, which has no value.
        """
        ...


class ModelDevice(Protocol):
    """What models need: layers. Packing may run in a thread of its own while steps are computed (new weights)."""

    @property
    def name(self) -> str: ...

    @property
    def ranks(self) -> RankGroup:
        """The group that computes the model, and this device's place in it."""
        ...

    def auto_dtype(self) -> str:
        """The name of the dtype that "auto" means here."""
        ...

    @property
    def block_formats(self) -> frozenset[str]:
        """The GGUF block formats that the layers compute with as they are, and formats of codes (ScaledTensor)."""
        ...

    @property
    def expert_formats(self) -> frozenset[str]:
        """Formats of the same kinds that layers of experts compute with."""
        ...

    def holds(self, weight: ScaledTensor) -> bool:
        """Whether `place` takes these codes: their format is in `block_formats`, and their sizes fit."""
        ...

    def place(self, weight: HostTensor | ScaledTensor | RandomTensor, *, form: str) -> Array:
        """A weight as an array of this device, in the format `form`: a dtype, or one of the formats above that it has.

        It may share the memory of `weight`.
        """
        ...

    def rounded(self, array: Array) -> Array:
        """A matrix of `place` as float8 with a scale for each output; itself if it is coded, or its sizes do not fit.

        For devices with float8_e4m3fn among their `block_formats`.
        """
        ...

    def to_host(self, array: Array, *, max_rows: int | None = None) -> HostTensor | ScaledTensor:
        """An array of `place` or `unpack`, or its first rows, in host memory. The caller must not change it."""
        ...

    def packing(self) -> AbstractContextManager[None]:
        """Around the work of a thread that reads or packs weights: steps do not wait for its copies.

        What it has made is there at the end of the block.
        """
        ...

    def open_shared(self, handle: Sequence[Any]) -> Array | None:
        """Bytes in memory of this device that another process shares (PyTorch's `rebuild_cuda_tensor`): uint8[n].

        None if this device cannot open it, or computes elsewhere.
        """
        ...

    def take(self, shared: Array, first: int, *, format: str, shape: tuple[int, ...], form: str) -> Array:
        """A copy of a tensor of numbers in `format` that begins at byte `first` of shared bytes, in the format `form`.

        The copy is there when the block of `packing` has ended.
        """
        ...

    def overwrite(self, pairs: Iterable[tuple[Array, Array]]) -> bool:
        """Copy each second array of `unpack` into the first one, and wait for the end. No step may run.

        False, and nothing was done: nothing on this device holds the addresses of a model's layers, or an array has
        another form than the one in its place.
        """
        ...

    def pack_linear(self, weights: Sequence[Array], biases: Sequence[Array] | None = None) -> Linear:
        """One linear layer out of the given ones, concatenated along the output features. Arrays come from `place`."""
        ...

    def pack_gated_linear(
        self,
        gate: Array,
        up: Array,
        *,
        gate_bias: Array | None = None,
        up_bias: Array | None = None,
        activation: Activation = "silu",
    ) -> GatedLinear: ...

    def pack_fused_gated_linear(self, gate_up: Array, *, activation: Activation = "silu") -> GatedLinear:
        """The same of one matrix, the rows of gate before those of up; it unpacks to that matrix."""
        ...

    def pack_experts(
        self,
        experts: Iterable[tuple[Array, Array, Array]],
        *,
        num_experts: int,
        routing: Routing,
        biases: ExpertBiases | None = None,
        activation: Activation = "silu",
    ) -> Experts:
        """A layer out of the gate, up and down of each expert, which are taken one after another, and their biases.

        MixedFormatsError if the experts differ in shape or format.
        """
        ...

    def rms_norm(
        self,
        residual: Array,
        weight: Array,
        eps: float,
        *,
        offset: float = 0.0,
        scale: float = 1.0,
        reader: Layer | None = None,
    ) -> Array:
        """float32[T, features] -> [T, features] (arXiv 1910.07467), times (`weight` + `offset`) times `scale`."""
        ...

    def add_and_norm(
        self,
        block: Layer,
        residual: Array,
        inputs: Sequence[Array],
        weight: Array,
        eps: float,
        *,
        offset: float = 0.0,
        reader: Layer | None = None,
    ) -> Array:
        """block.add_to(residual, *inputs) of Linear or Experts, then `rms_norm` of the residual."""
        ...

    def add_rms_norm(self, residual: Array, x: Array, weight: Array, eps: float, *, offset: float = 0.0) -> None:
        """residual += the norm of x [T, features]. `residual` is float32."""
        ...

    def without_norm(self, residual: Array, like: Array) -> Array:
        """float32[T, features] -> [T, features] as linear layers take it; `like` is a parameter of the model."""
        ...

    def all_reduce(self, x: Array) -> Array:
        """The sum of x over all ranks, which may take the place of x. The same bits on every rank."""
        ...

    def add_reduced(self, residual: Array, x: Array) -> None:
        """residual += the sum of x over all ranks. `residual` is float32; for groups of several ranks."""
        ...


class RunnerDevice(Protocol):
    """What a runner needs of every device: memory. Steps run in one thread.

    A row's results should not depend on the other rows of its step, nor on how its tokens are cut into chunks. With
    the CPU's kernels they are the same bits, so text does not change with load or with cache hits.
    """

    def free_memory_bytes(self) -> int:
        """Memory that can still be allocated."""
        ...

    def trim_memory(self) -> None:
        """Give unused memory back to the system."""
        ...

    def allocate_kv(self, layout: KVLayout, num_pages: int) -> KVMemory: ...


class Device(ModelDevice, RunnerDevice, Protocol):
    """Both, as what builds an engine needs them: cpu/device.py and cuda/device.py."""
