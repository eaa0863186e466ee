"""Quantised weights of a Hugging Face folder, under the names that plain weights have."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headwater.devices.host_tensor import HostTensor
from headwater.devices.safetensors_header import StoredTensor
from headwater.devices.scaled_tensor import ScaledTensor
from headwater.models.model_files import ModelFileError
from headwater.models.quantised.layouts import expected, is_codes, read, shape_of
from headwater.models.quantised.scheme import MARKERS, Quantisation, Scheme
from headwater.models.weights_safetensors import PLAIN_TYPES, SafetensorsWeights

QUANTISED_TYPES = (*PLAIN_TYPES, "F8_E4M3", "I8", "I32", "I64")
# scales of activations and of keys and values: neither is rounded to 8 bits as the publisher's engine would
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale")
_OF_KV = ("k_scale", "v_scale", "kv_scale", "q_scale", "k_zero_point", "v_zero_point")
_MARKERS = frozenset(MARKERS.values())


@dataclass(frozen=True, slots=True)
class _Module:
    """One quantised linear layer: its scheme, the shape of its matrix, and the names of its tensors."""

    scheme: Scheme
    shape: tuple[int, int]
    found: frozenset[str]


class QuantisedWeights:
    """A `WeightSource`: `model.layers.0.mlp.up_proj.weight` is read from what is stored for that module.

    Modules whose weight is stored as plain numbers are read as such. ModelFileError, which names the tensor and its
    file, for a module that lacks a tensor, has one of another type or shape, or should not be quantised.
    """

    def __init__(self, weights: SafetensorsWeights, quantisation: Quantisation) -> None:
        self.place: Path | str = weights.place
        self._weights = weights
        self._quantisation = quantisation
        self._stored = stored = weights.stored()
        self._modules = self._find_modules()
        hidden = {f"{module}.{name}" for module, known in self._modules.items() for name in known.found}
        self._plain = [name for name in stored if name not in hidden and not self._is_unused(name)]
        for name in self._plain:
            self._check_plain(name)

    def place_of(self, name: str) -> Path:
        module = name.removesuffix(".weight")
        known = self._modules.get(module)
        return self._weights.place_of(name if known is None else f"{module}.{MARKERS[known.scheme.layout]}")

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        plain = {name: self._stored[name].shape for name in self._plain}
        return plain | {f"{module}.weight": known.shape for module, known in self._modules.items()}

    def load(self, name: str) -> HostTensor | ScaledTensor:
        module, _, kind = name.rpartition(".")
        known = self._modules.get(module) if kind == "weight" else None
        if known is None:
            return self._weights.load(name)
        try:
            return read(known.scheme, known.shape, lambda each: self._weights.load(f"{module}.{each}"), known.found)
        except ModelFileError:
            raise
        except ValueError as error:
            raise self._refuse(f"{module}.{MARKERS[known.scheme.layout]}", str(error)) from None

    def _find_modules(self) -> dict[str, _Module]:
        modules = {}
        for name, marker in self._stored.items():
            module, _, kind = name.rpartition(".")
            if kind not in _MARKERS or (kind == "weight" and marker.dtype in PLAIN_TYPES):
                continue
            scheme = self._quantisation.scheme_of(module)
            if scheme is None:
                raise self._refuse(name, "is quantised, and quantization_config says that its module is not")
            if MARKERS[scheme.layout] != kind or not is_codes(scheme, marker):
                said = f"{MARKERS[scheme.layout]} of {scheme.layout}, {scheme.bits} bits"
                raise self._refuse(name, f"of type {marker.dtype} is not what quantization_config says: {said}")
            modules[module] = self._checked(module, name, scheme, marker)
        return modules

    def _checked(self, module: str, name: str, scheme: Scheme, marker: StoredTensor) -> _Module:
        for each in scheme.needed:
            if f"{module}.{each}" not in self._stored:
                raise self._refuse(name, f"has no {module}.{each} beside it, which its layout needs")
        try:
            shape = shape_of(scheme, marker)
        except ValueError as error:
            raise self._refuse(name, str(error)) from None
        found = {each for each in (*scheme.needed, *scheme.optional) if f"{module}.{each}" in self._stored}
        for each, (dtypes, shapes) in expected(scheme, shape).items():
            if each not in found:
                continue
            beside = self._stored[f"{module}.{each}"]
            if beside.dtype not in dtypes or beside.shape not in shapes:
                raise self._refuse(
                    f"{module}.{each}",
                    f"is {beside.dtype}{list(beside.shape)}; {name} of {scheme.layout} needs "
                    f"{' or '.join(dtypes)}{list(shapes[0])}",
                )
        return _Module(scheme, shape, frozenset(found))

    def _check_plain(self, name: str) -> None:
        if self._stored[name].dtype not in PLAIN_TYPES:
            reason = f"is of type {self._stored[name].dtype}, and belongs to no quantised module of this checkpoint"
            raise self._refuse(name, reason)

    def _is_unused(self, name: str) -> bool:
        module, _, kind = name.rpartition(".")
        if kind in _OF_ACTIVATIONS:
            return module in self._modules
        return kind in _OF_KV and self._quantisation.has_kv_scales

    def _refuse(self, name: str, reason: str) -> ModelFileError:
        return ModelFileError(self._weights.file_of(name).path, f"tensor {name!r} {reason}")
