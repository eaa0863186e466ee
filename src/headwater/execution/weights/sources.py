"""Where the tensors of new weights come from: a model in place, what host memory keeps of it, checkpoints over it."""

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from headwater.devices.device import ModelDevice
from headwater.devices.host_tensor import HostTensor, RandomTensor
from headwater.devices.scaled_tensor import ScaledTensor
from headwater.models.config import ModelConfig
from headwater.models.decoder import DecoderModel
from headwater.models.model_files import ModelFileError
from headwater.models.reading.build_decoder import Base
from headwater.models.weights import PlacedArray, WeightSource
from headwater.staged_read import Abandoned


class HostTensors:
    """A `WeightSource`: all parameters of a model, copied to host memory."""

    place = "the weights kept in host memory"

    def __init__(self, model: DecoderModel, device: ModelDevice) -> None:
        names = model.config.parameter_shapes()
        self._tensors = {name: device.to_host(model.get_by_name(name)) for name in names}

    def place_of(self, name: str) -> str:
        return self.place

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def load(self, name: str) -> HostTensor | ScaledTensor:
        return self._tensors[name]


class Overlay:
    """A `WeightSource` of a model's own tensors, each hidden by the newest checkpoint that holds it."""

    place: Path | str = "the served weights"

    def __init__(self, config: ModelConfig, model: DecoderModel | None, abandoned: threading.Event) -> None:
        self._model = model
        self.abandoned = abandoned
        self._own = config.parameter_shapes()
        self._newest: dict[str, WeightSource] = {}

    @property
    def num_new(self) -> int:
        """Tensors of the model that some checkpoint holds."""
        return sum(1 for name in self._newest if name in self._own)

    @property
    def base(self) -> Base | None:
        """The model, if there is one, and what the checkpoints replace."""
        return None if self._model is None else Base(self._model, frozenset(self._newest))

    @property
    def names_to_read(self) -> list[str]:
        """Tensors of the model that some checkpoint holds, in about the order in which a model is built: layers first.

        Each is loaded once.
        """
        found = [name for name in self._own if name in self._newest]
        return sorted(found, key=lambda name: ".layers." not in name)

    def add(self, source: WeightSource) -> None:
        """Add `source` on top. ValueError if it holds no tensor of this model."""
        if not any(name in self._own for name in source.shapes()):
            raise ModelFileError(source.place, "the checkpoint holds no tensor of this model")
        self.place = source.place
        self._newest |= dict.fromkeys(source.shapes(), source)

    def place_of(self, name: str) -> Path | str:
        source = self._newest.get(name)
        return self.place if source is None else source.place_of(name)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        own = self._own if self._model is not None else {}
        return {**own, **{name: source.shapes()[name] for name, source in self._newest.items()}}

    def load(self, name: str) -> HostTensor | ScaledTensor | RandomTensor | PlacedArray:
        if self.abandoned.is_set():
            raise Abandoned
        source = self._newest.get(name)
        if source is not None:
            return source.load(name)
        assert self._model is not None
        return PlacedArray(self._model.get_by_name(name))


def checksums_of(model: DecoderModel, device: ModelDevice, abandoned: threading.Event) -> dict[str, str]:
    """A hash of every parameter as the device computes with it; 16 hex digits. `Abandoned` if the event is set."""
    found = {}
    for name, array in model.iter_named():
        if abandoned.is_set():
            raise Abandoned
        tensor = device.to_host(array)
        digest = hashlib.blake2b(f"{tensor.format} {tensor.shape}".encode(), digest_size=8)
        for values in tensor.arrays():
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        found[name] = digest.hexdigest()
    return found
