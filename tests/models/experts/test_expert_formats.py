"""Experts of a checkpoint in several formats: served with the checkpoint's numbers, or refused by name."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import usable_kernels
from headwater.devices.device import Routing
from headwater.devices.host_tensor import HostTensor
from headwater.devices.quantise import quantise
from headwater.models.model_files import ModelFileError
from headwater.models.weights import PlacedArray, PlacedWeights, WeightForm

HIDDEN, INNER = 64, 32
NAMES = [[f"experts.{expert}.{which}" for which in ("gate", "up", "down")] for expert in range(3)]
pytestmark = pytest.mark.skipif(usable_kernels() is None, reason="no kernels for this CPU, or no compiler")


class Source:
    """Three experts, of which the second has blocks of other bits."""

    place: Path | str = "a checkpoint"

    def __init__(self) -> None:
        self.placed: dict[str, PlacedArray] = {}
        self._tensors = {}
        random = np.random.default_rng(1)
        for expert, names in enumerate(NAMES):
            for name in names:
                shape = (HIDDEN, INNER) if name.endswith("down") else (INNER, HIDDEN)
                values = HostTensor.of(random.standard_normal(shape).astype(np.float32))
                self._tensors[f"{name}.weight"] = quantise(values, "Q4_0" if expert == 1 else "Q8_0")

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def load(self, name: str) -> HostTensor | PlacedArray:
        return self.placed.get(name, self._tensors[name])


def _placed(source: Source) -> PlacedWeights:
    device = CpuDevice(num_threads=2)
    return PlacedWeights(source, device, WeightForm("bfloat16", device.block_formats))


def test_blocks_of_several_formats_are_widened() -> None:
    """Some layouts have blocks only where these hold all numbers of a matrix, so one expert may be another kind."""
    source = Source()
    placed = _placed(source)
    layer = placed.experts(NAMES, Routing(2, renormalises=True))
    for expert, names in enumerate(NAMES):
        for which, name in enumerate(names):
            found, given = layer.matrix(expert, which), source.load(f"{name}.weight")
            assert isinstance(given, HostTensor) and found.format == "bfloat16"
            np.testing.assert_array_equal(found.data, given.astype("bfloat16").data)
    assert placed.num_bytes == 2 * 9 * HIDDEN * INNER and placed.widened == {"Q8_0": 6, "Q4_0": 3}


def test_a_part_of_a_layer_in_blocks_is_refused_by_name() -> None:
    """The others are in place: as numbers of blocks, which bfloat16 would round."""
    source = Source()
    for name in NAMES[0]:
        given = source.load(f"{name}.weight")
        assert isinstance(given, HostTensor)
        source.placed[f"{name}.weight"] = PlacedArray(HostTensor.of(given.to_float32()))
    with pytest.raises(ModelFileError, match=r"'experts.0.gate' and others of its layer: .* one format and shape"):
        _placed(source).experts(NAMES, Routing(2, renormalises=True))
