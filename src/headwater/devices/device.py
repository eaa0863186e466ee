"""What models and runners need of a device: two protocols, which cpu/device.py and cuda/device.py implement.

Shape letters: T tokens of a step, R rows (requests) of a step, H query heads, G KV heads, D head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from headwater.devices.host_tensor import HostTensor, RandomTensor
from headwater.devices.kv_memory import KVLayout, KVMemory

Batch = TypeVar("Batch", contravariant=True)
Array = Any  # a device's own array: shared code passes it on, and does not look into it
Weight = HostTensor | RandomTensor | Array


class Linear(Protocol):
    """y = x W^T + b with W in whatever form suits the device."""

    in_features: int
    out_features: int

    def __call__(self, x: Array) -> Array:
        """[T, in] -> [T, out], both in the weight's dtype."""
        ...

    def add_to(self, residual: Array, x: Array) -> None:
        """residual += x W^T + b. `residual` is float32[T, out]."""
        ...

    def logits(self, x: Array, out: Array | None = None) -> Array:
        """[T, in] -> float32[T, out], not rounded to the weight's dtype where the device can avoid it.

        If `out` is given, the result is written there, and `out` is returned.
        """
        ...

    def rows(self, ids: Array) -> Array:
        """Rows of W, as an embedding looks them up. int64[T] -> [T, in]."""
        ...

    def unpack(self) -> tuple[Array, Array | None]:
        """W [out, in] and the bias [out]: views or copies, which the caller must not change."""
        ...


class GatedLinear(Protocol):
    """y = silu(x Wg^T + bg) * (x Wu^T + bu): the first half of a gated MLP (arXiv 2002.05202)."""

    def __call__(self, x: Array) -> Array:
        """[T, in] -> [T, out]."""
        ...

    def unpack(self) -> tuple[Array, Array, Array | None, Array | None]:
        """Wg, Wu [out, in] and their biases."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """The shape of a model's attention, the same in every layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float  # of the QK-norm, where a model has one


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which tokens a step computes and where their sequences lie, as arrays of the host.

    Row r computes query positions context_lens[r] - query_lens[r] .. context_lens[r] - 1 of its sequence.
    Its tokens are [query_starts[r], query_starts[r + 1]) of the step's T tokens.
    """

    query_starts: npt.NDArray[np.int32]  # [R + 1]
    context_lens: npt.NDArray[np.int32]  # [R], the tokens of this step included
    page_tables: npt.NDArray[np.int32]  # [R, at least the pages of the longest context]
    positions: npt.NDArray[np.int32]  # [T]
    cos: Array  # float32[T, D / 2], of the positions
    sin: Array  # float32[T, D / 2]

    @property
    def query_lens(self) -> npt.NDArray[np.int32]:
        return np.diff(self.query_starts)


class StepAttention(Protocol):
    """The attention of one step. What all layers share has been prepared."""

    def __call__(
        self, qkv: Array, layer: int, q_norm: Array | None, k_norm: Array | None
    ) -> Array:
        """Norm and rotate q and k, write k and v to their pages, attend causally through the page tables.

        `qkv` is [T, (H + 2G) D], may be overwritten; returns [T, H D] in the same dtype.
        """
        ...


class ModelDevice(Protocol):
    """What models need: layers. Packing may run in a thread of its own while steps are computed (new weights)."""

    @property
    def torch_device(self) -> Any:
        """Where arrays lie, for those who make arrays with PyTorch."""
        ...

    @property
    def name(self) -> str: ...

    def auto_dtype(self) -> str:
        """The name of the dtype that "auto" means here."""
        ...

    @property
    def block_formats(self) -> frozenset[str]:
        """The GGUF block formats that the layers compute with as they are."""
        ...

    def place(self, weight: Weight, *, form: str) -> Array:
        """A weight as an array of this device, in the format `form`: a dtype, or one of `block_formats` that it has.

        It may share the memory of `weight`.
        """
        ...

    def to_host(self, array: Array, *, max_rows: int | None = None) -> HostTensor:
        """An array of `place` or `unpack`, or its first rows, in host memory. The caller must not change it."""
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
    ) -> GatedLinear: ...

    def rms_norm(self, residual: Array, weight: Array, eps: float) -> Array:
        """float32[T, features] -> [T, features] in `weight`'s dtype (arXiv 1910.07467)."""
        ...


class RunnerDevice(Protocol[Batch]):
    """What a runner needs: KV memory and attention over it. Steps run in one thread.

    `Batch` says which tokens a step computes and where their sequences lie: `AttentionBatch` on a CPU, `PagedBatch`
    (cuda/paged_batch.py) on a GPU.

    A row's results should not depend on the other rows of its step, nor on how its tokens are cut into chunks. With
    the native CPU kernels they are the same bits, so text does not change with load or with cache hits.
    """

    @property
    def torch_device(self) -> Any:
        """Where arrays lie, for those who make arrays with PyTorch."""
        ...

    def free_memory_bytes(self) -> int:
        """Memory that can still be allocated."""
        ...

    def trim_memory(self) -> None:
        """Give unused memory back to the system."""
        ...

    def allocate_kv(self, layout: KVLayout, num_pages: int) -> KVMemory: ...

    def plan_attention(self, geometry: AttentionGeometry, batch: Batch, *, kv: KVMemory) -> StepAttention:
        """Prepare the attention of one step, for all layers."""
        ...


class Device(ModelDevice, RunnerDevice[Any], Protocol):
    """Both, as what builds an engine needs them: cpu/device.py and cuda/device.py."""
