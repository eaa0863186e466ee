"""Sources of parameters: named tensors, read one at a time, under their Hugging Face checkpoint names."""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from headwater.devices.device import (
    Activation,
    Array,
    ExpertBiases,
    Experts,
    GatedLinear,
    Linear,
    ModelDevice,
    Routing,
)
from headwater.devices.errors import MixedFormatsError
from headwater.devices.host_tensor import STORAGE_TYPES, HostTensor, RandomTensor
from headwater.devices.quantise import can_quantise, quantise
from headwater.devices.scaled_tensor import CODE_BLOCKS, ScaledTensor
from headwater.models.model_files import ModelFileError

ROUNDED = "float8_e4m3fn"  # what a device makes of the plain matrices of layers, but not of embeddings and heads
# leftovers of old checkpoints; derived from the config instead
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlacedArray:
    """An array that the device has made for another model of the same shapes."""

    array: Array


class WeightSource(Protocol):
    """Named tensors of one checkpoint. Reading one does not load the others."""

    @property
    def place(self) -> Path | str:
        """The name of the source in errors."""
        ...

    def place_of(self, name: str) -> Path | str:
        """The name of one tensor's file in errors."""
        ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor of the checkpoint."""
        ...

    def load(self, name: str) -> HostTensor | ScaledTensor | RandomTensor | PlacedArray:
        """One tensor, in the format of the checkpoint; normally a HostTensor.

        The caller may keep it but must not change it.
        """
        ...


class DummyWeights:
    """Seeded random parameters: the same for the same config, seed and kind of device. For benchmarks and tests."""

    place = "dummy weights"
    _SCALE = 0.02  # the initializer_range of the families served

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> None:
        self._shapes = dict(shapes)
        self._seed = seed

    def place_of(self, name: str) -> Path | str:
        return self.place

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def load(self, name: str) -> HostTensor | RandomTensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return HostTensor.of(np.ones(shape, dtype=np.float32))
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        return RandomTensor(shape, seed=int.from_bytes(digest, "little") >> 1, scale=self._SCALE)


@dataclass(frozen=True, slots=True)
class WeightForm:
    """The formats in which weights are served.

    GGUF blocks of the `kept` formats stay as they are, and so do codes with scales (ScaledTensor), or they become
    blocks of one of these formats. Other matrices are put in `quantised` blocks if that is one of the `kept` formats;
    all else becomes `dtype`.
    """

    dtype: str
    kept: frozenset[str] = frozenset()
    quantised: str = ""


class LayerSource(Protocol):
    """The parameters of a model as a device computes with them: `names` are matrices without their ".weight"."""

    num_bytes: int  # in their form

    def load(self, name: str) -> Array:
        """A tensor that is no part of a linear layer."""
        ...

    def linear(self, names: Sequence[str], *, has_bias: bool = False, stays_plain: bool = False) -> Linear:
        """`stays_plain`: the matrices are not quantised, whatever the form."""
        ...

    def gated_linear(
        self, names: Sequence[str], *, has_bias: bool = False, activation: Activation = "silu"
    ) -> GatedLinear:
        """Of gate and up, or of one matrix that is both."""
        ...

    def experts(
        self,
        names: Sequence[Sequence[str]],
        routing: Routing,
        *,
        has_bias: bool = False,
        activation: Activation = "silu",
    ) -> Experts:
        """`names`: gate, up and down of each expert."""
        ...


class StoredLayers(LayerSource, Protocol):
    """The layers of a model that was loaded before."""

    weights_id: str


class LayerCache(Protocol):
    """Keeps a device's layers from start to start (devices/cpu/packed_cache.py)."""

    def open(self, weights: str) -> StoredLayers | None:
        """The layers that were stored under this key; None if there are none."""
        ...

    def store(self, weights: str, parts: Mapping[str, Any], *, weights_id: str, num_bytes: int) -> None:
        """Keep the `parts` of PlacedWeights. Returns at once; they must not change."""
        ...


class PlacedWeights:
    """The tensors of a source as arrays and layers of a device (LayerSource).

    `num_bytes` counts the tensors that were loaded. `parts` holds what was handed out: arrays under their names, and
    layers under that of their first matrix. `widened` counts quantised matrices that became plain numbers, by format.
    """

    def __init__(self, source: WeightSource, device: ModelDevice, form: WeightForm) -> None:
        self._source = source
        self._device = device
        self._form = form
        self.num_bytes = 0
        self.parts: dict[str, Any] = {}
        self.widened: Counter[str] = Counter()

    def load(self, name: str) -> Array:
        self.parts[name] = array = self._place(name)
        return array

    def linear(self, names: Sequence[str], *, has_bias: bool = False, stays_plain: bool = False) -> Linear:
        biases = [self._place(name + ".bias") for name in names] if has_bias else None
        weights = [self._place(name + ".weight", stays_plain=stays_plain) for name in names]
        layer = self._device.pack_linear(weights, biases)
        self.parts[names[0]] = layer
        return layer

    def gated_linear(
        self, names: Sequence[str], *, has_bias: bool = False, activation: Activation = "silu"
    ) -> GatedLinear:
        if len(names) == 1:
            assert not has_bias
            layer = self._device.pack_fused_gated_linear(self._place(names[0] + ".weight"), activation=activation)
            self.parts[names[0]] = layer
            return layer
        gate, up = (self._place(name + ".weight") for name in names)
        gate_bias, up_bias = (self._place(name + ".bias") for name in names) if has_bias else (None, None)
        layer = self._device.pack_gated_linear(
            gate, up, gate_bias=gate_bias, up_bias=up_bias, activation=activation
        )
        self.parts[names[0]] = layer
        return layer

    def experts(
        self,
        names: Sequence[Sequence[str]],
        routing: Routing,
        *,
        has_bias: bool = False,
        activation: Activation = "silu",
    ) -> Experts:
        """In one format: as plain numbers if the blocks of the checkpoint differ."""
        biases: ExpertBiases | None = None
        if has_bias:
            biases = [tuple(self._place(name + ".bias") for name in each) for each in names]  # type: ignore[misc]
        pack = partial(self._experts, names, routing, biases=biases, activation=activation)
        num_bytes, widened = self.num_bytes, self.widened.copy()
        try:
            layer = pack(widens=False)
        except MixedFormatsError:
            self.num_bytes, self.widened = num_bytes, widened
            _log.warning("%s and the experts beside it have several formats, and are widened", names[0][0])
            try:
                layer = pack(widens=True)
            except MixedFormatsError as error:  # others of the layer are in place, in blocks
                raise ModelFileError(self._source.place, f"{names[0][0]!r} and others of its layer: {error}") from None
        self.parts[names[0][0]] = layer
        return layer

    def _experts(
        self,
        names: Sequence[Sequence[str]],
        routing: Routing,
        *,
        widens: bool,
        biases: ExpertBiases | None,
        activation: Activation,
    ) -> Experts:
        def placed() -> Iterator[tuple[Array, Array, Array]]:
            for each in names:
                gate, up, down = (self._place(f"{name}.weight", is_expert=True, stays_plain=widens) for name in each)
                yield gate, up, down

        return self._device.pack_experts(
            placed(), num_experts=len(names), routing=routing, biases=biases, activation=activation
        )

    def _place(self, name: str, *, stays_plain: bool = False, is_expert: bool = False) -> Array:
        """`stays_plain`: plain numbers are not quantised; of an expert, blocks and codes become plain numbers."""
        weight = self._source.load(name)
        may_round = self._form.quantised == ROUNDED and not is_expert
        is_rounded = may_round and ".layers." in name and name.endswith("_proj.weight")
        if isinstance(weight, PlacedArray):
            return self._device.rounded(weight.array) if is_rounded else weight.array
        kept = self._form.kept & (self._device.expert_formats if is_expert else self._device.block_formats)
        if is_expert and stays_plain:
            kept = frozenset()
        weight = self._served(weight, kept)
        if isinstance(weight, HostTensor | ScaledTensor) and weight.format in kept:
            self.num_bytes += weight.nbytes
            return self._device.place(weight, form=weight.format)
        assert not isinstance(weight, ScaledTensor)
        if is_rounded and not (isinstance(weight, HostTensor) and weight.has_blocks):
            self.num_bytes += math.prod(weight.shape)
            return self._device.rounded(self._device.place(weight, form=_exact(weight)))
        weight = weight if stays_plain else self._quantised(weight)
        if isinstance(weight, HostTensor) and weight.format in kept:
            self.num_bytes += weight.nbytes
            return self._device.place(weight, form=weight.format)
        self.num_bytes += math.prod(weight.shape) * STORAGE_TYPES[self._form.dtype].itemsize
        return self._device.place(weight, form=self._form.dtype)

    def _served(
        self, weight: HostTensor | ScaledTensor | RandomTensor, kept: frozenset[str]
    ) -> HostTensor | ScaledTensor | RandomTensor:
        """Codes as they are, or in blocks that are served with the same numbers, else as plain numbers."""
        if isinstance(weight, HostTensor) and weight.has_blocks and weight.format in self._form.kept - kept:
            self.widened[weight.format] += 1
        if not isinstance(weight, ScaledTensor) or (weight.format in kept and self._device.holds(weight)):
            return weight
        blocks = weight.to_blocks() if kept & CODE_BLOCKS else None
        if blocks is not None and blocks.format in kept:
            return blocks
        self.widened[weight.format] += 1
        return weight.astype(self._form.dtype)

    def _quantised(self, weight: HostTensor | RandomTensor) -> HostTensor | RandomTensor:
        form = self._form.quantised
        if not form or form == ROUNDED:
            return weight
        host = weight.to_host() if isinstance(weight, RandomTensor) else weight
        return quantise(host, form) if can_quantise(host) else host


def _exact(weight: HostTensor | RandomTensor) -> str:
    """A format in which a device holds the numbers as they are."""
    is_short = isinstance(weight, HostTensor) and weight.format in ("bfloat16", "float16")
    return weight.format if is_short else "float32"  # type: ignore[union-attr]


def check_shapes(expected: Mapping[str, tuple[int, ...]], source: WeightSource, *, tied_head: bool) -> None:
    """Raise ModelFileError if the checkpoint lacks a tensor, has a wrong shape, or holds an unused tensor."""
    found = source.shapes()
    for name, shape in expected.items():
        if name not in found:
            raise ModelFileError(source.place, f"the checkpoint lacks tensor {name!r} (expected shape {list(shape)})")
        if tuple(found[name]) != shape:
            reason = f"tensor {name!r} has shape {list(found[name])} in the checkpoint, expected {list(shape)}"
            raise ModelFileError(source.place_of(name), reason)
    for name in unexpected_names(expected, found, tied_head=tied_head):
        reason = f"the checkpoint holds tensor {name!r} of shape {list(found[name])}, which this architecture lacks"
        raise ModelFileError(source.place_of(name), reason)


def unexpected_names(expected: Iterable[str], found: Iterable[str], *, tied_head: bool) -> Iterator[str]:
    """Names in `found` that no parameter has, except harmless leftovers."""
    known = set(expected)
    for name in found:
        if name in known or name.endswith(IGNORED_SUFFIXES) or (tied_head and name == "lm_head.weight"):
            continue
        yield name
