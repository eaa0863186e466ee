"""Quantised models on a GPU stay quantised; without a GPU the same code runs on a CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch
from quantised_checkpoints import CONFIG, EXPERTS, NAMES, write_checkpoint, write_folder

from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.products.coded_matrix import CodedMatrix
from headwater.devices.host_tensor import HostTensor
from headwater.devices.scaled_tensor import ScaledTensor
from headwater.execution.weights.sources import HostTensors, checksums_of
from headwater.models.loader import LoadedModel, load_model, resolve_model
from headwater.models.reading.build_decoder import build_decoder, copy_decoder
from headwater.models.weights import PlacedWeights

pytestmark = pytest.mark.slow

PLACE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
UP = "model.layers.0.mlp.up_proj.weight"


def load(folder: Path, **options: object) -> LoadedModel:
    return load_model(resolve_model(str(folder)), device=CudaDevice(PLACE), **options)  # type: ignore[arg-type]


def host(loaded: LoadedModel, name: str) -> HostTensor | ScaledTensor:
    return CudaDevice(PLACE).to_host(loaded.model.get_by_name(name))


@pytest.mark.parametrize("name", NAMES)
def test_codes_stay_codes(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """But for inputs in the order of activations, which are counted in the log."""
    parameters = write_checkpoint(tmp_path, name)
    loaded = load(tmp_path)
    is_coded = not name.endswith("act-order")
    assert ("quantised matrices" in caplog.text) == (not is_coded), caplog.text
    for parameter, numbers in parameters.items():
        if parameter.endswith("_proj.weight"):
            assert isinstance(loaded.model.get_by_name(parameter), CodedMatrix) == is_coded
            found = host(loaded, parameter).to_float32()
            bound = {"rtol": 1e-3, "atol": 1e-3} if is_coded else {"rtol": 2**-8, "atol": 1e-9}
            assert np.allclose(found, numbers, **bound), parameter
    if is_coded:
        wide = load(tmp_path, dtype="bfloat16")
        assert loaded.weights_bytes < 0.75 * wide.weights_bytes
        assert loaded.weights_id != wide.weights_id


def test_experts_become_plain_and_float8_is_not_made_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their kernels take plain numbers. What surrounds them stays codes, and the log counts the others."""
    parameters = write_checkpoint(tmp_path, "gptq", model=EXPERTS)
    loaded = load(tmp_path)
    assert "12 quantised matrices (int4) become bfloat16" in caplog.text
    down = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert np.allclose(host(loaded, down).to_float32(), parameters[down], rtol=2**-8, atol=1e-9)
    assert host(loaded, "model.layers.0.self_attn.o_proj.weight").format == "int4"
    with pytest.raises(ValueError, match="quantization 'fp8' does not go with experts on device 'cuda'"):
        load(tmp_path, quantization="fp8")


def test_plain_weights_become_float8_on_request(tmp_path: Path) -> None:
    """The matrices of layers, in half of the memory; embeddings, heads and norms stay as they are."""
    numbers = write_checkpoint(tmp_path / "packed", "packed")
    write_folder(tmp_path / "plain", CONFIG, {name: ("F32", values) for name, values in numbers.items()})
    plain, rounded = load(tmp_path / "plain"), load(tmp_path / "plain", quantization="fp8")
    assert plain.weights_id != rounded.weights_id == load(tmp_path / "plain", quantization="fp8").weights_id
    assert rounded.weights_bytes < 0.75 * plain.weights_bytes
    found, largest = host(rounded, UP), np.abs(numbers[UP]).max(axis=1, keepdims=True)
    assert found.format == "float8_e4m3fn"
    assert (np.abs(found.to_float32() - numbers[UP]) <= np.abs(numbers[UP]) * 2**-4 + largest * 2**-9).all()
    assert host(rounded, "lm_head.weight").format == "bfloat16"
    made_up = load(tmp_path / "plain", quantization="fp8", load_format="dummy")
    assert made_up.weights_bytes == rounded.weights_bytes


def test_new_weights_of_the_same_codes_go_into_the_memory_of_the_old_ones(tmp_path: Path) -> None:
    """Of other codes they cannot: nothing is done, and the model is replaced."""
    write_checkpoint(tmp_path / "first", "packed")
    second = write_checkpoint(tmp_path / "second", "gptq")
    write_checkpoint(tmp_path / "other", "float8-channel")
    model, device = load(tmp_path / "first").model, CudaDevice(PLACE)
    matrix = model.get_by_name(UP)
    before = checksums_of(model, device, _Never())  # type: ignore[arg-type]
    assert not copy_decoder(model, load(tmp_path / "other").model, device)
    assert checksums_of(model, device, _Never()) == before  # type: ignore[arg-type]
    assert copy_decoder(model, load(tmp_path / "second").model, device)
    assert np.allclose(device.to_host(matrix).to_float32(), second[UP], atol=1e-5), "the same memory"


def test_what_host_memory_keeps_gives_the_same_codes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "awq")
    loaded, device = load(tmp_path), CudaDevice(PLACE)
    kept = HostTensors(loaded.model, device)
    again = build_decoder(loaded.config, PlacedWeights(kept, device, loaded.form), device)
    never = _Never()
    assert checksums_of(again, device, never) == checksums_of(loaded.model, device, never)  # type: ignore[arg-type]


class _Never:
    def is_set(self) -> bool:
        return False
