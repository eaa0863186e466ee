"""The share of a rank as a source of its own (weights.WeightSource)."""

from collections.abc import Mapping
from pathlib import Path

from headwater.devices.host_tensor import HostTensor, RandomTensor
from headwater.devices.scaled_tensor import ScaledTensor
from headwater.models.config import ModelConfig
from headwater.models.ranks.share import ModelShare
from headwater.models.weights import PlacedArray, WeightSource


class ShareOfWeights:
    """The tensors of a whole source, each cut to a rank's share when it is loaded.

    Blocks of the `kept` formats stay as they are; others are cut as numbers. An array that was placed before belongs
    to a model of the same share.
    """

    def __init__(self, source: WeightSource, config: ModelConfig, share: ModelShare, *, kept: frozenset[str]) -> None:
        self._source = source
        self._config = config
        self._share = share
        self._kept = kept

    @property
    def place(self) -> Path | str:
        return self._source.place

    def place_of(self, name: str) -> Path | str:
        return self._source.place_of(name)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the whole tensors."""
        return self._source.shapes()

    def load(self, name: str) -> HostTensor | ScaledTensor | RandomTensor | PlacedArray:
        weight = self._source.load(name)
        if isinstance(weight, PlacedArray):
            return weight
        if isinstance(weight, HostTensor) and weight.has_blocks and weight.format not in self._kept:
            weight = HostTensor.of(weight.to_float32())
        return self._share.cut(name, weight, self._config)
