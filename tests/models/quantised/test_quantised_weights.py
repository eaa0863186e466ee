"""Published layouts of quantised weights: the numbers they mean, what a device computes with, and what is refused."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from quantised_checkpoints import CONFIG, CONFIGS, EXPERTS, NAMES, Stored, draw, write_checkpoint, write_folder

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import usable_kernels
from headwater.devices.cpu.packed_cache import PackedCache
from headwater.devices.safetensors_header import StoredTensor
from headwater.models import loader
from headwater.models.config import parse_hf_config
from headwater.models.fields import Fields
from headwater.models.loader import load_model, open_weights, read_config, resolve_model
from headwater.models.model_files import ModelFileError
from headwater.models.quantised.layouts import expected, shape_of
from headwater.models.quantised.quantization_config import read_quantisation

KERNELS = usable_kernels() is not None
# names, types and shapes of one layer of the real checkpoints: [out, in], and each tensor
REAL = {
    # Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4, model.layers.0.mlp.down_proj
    "gptq": ((3584, 18944), {"qweight": (2368, 3584), "qzeros": (148, 448), "scales": (148, 3584), "g_idx": (18944,)}),
    # hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4, model.layers.0.mlp.down_proj
    "awq": ((4096, 14336), {"qweight": (14336, 512), "qzeros": (112, 512), "scales": (112, 4096)}),
    # RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16, model.layers.0.mlp.down_proj
    "packed": ((4096, 14336), {"weight_packed": (4096, 1792), "weight_scale": (4096, 112), "weight_shape": (2,)}),
    # RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w8a8, model.layers.0.self_attn.k_proj
    "int8": ((1024, 4096), {"weight": (1024, 4096), "weight_scale": (1024, 1)}),
    # RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic and -FP8, model.layers.0.self_attn.k_proj
    "float8-channel": ((1024, 4096), {"weight": (1024, 4096), "weight_scale": (1024, 1)}),
    "float8-tensor": ((1024, 4096), {"weight": (1024, 4096), "weight_scale": (1,)}),
    # Qwen/Qwen3-8B-FP8, model.layers.0.mlp.gate_proj
    "fp8": ((12288, 4096), {"weight": (12288, 4096), "weight_scale_inv": (96, 32)}),
}


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_format(tmp_path: Path, name: str) -> None:
    """To float32's last bits, in any sharding: a module's tensors may lie in different files."""
    parameters = write_checkpoint(tmp_path, name, num_shards=3)
    files = resolve_model(str(tmp_path))
    source = open_weights(files, read_config(files), load_format="auto", seed=0)
    assert source.shapes() == {name: numbers.shape for name, numbers in parameters.items()}
    for parameter, numbers in parameters.items():
        found = source.load(parameter).to_float32()  # type: ignore[union-attr]
        assert np.allclose(found, numbers, rtol=1e-6, atol=0), parameter


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("use_kernels", [False, *([True] if KERNELS else [])])
def test_a_cpu_serves_the_same_numbers(
    tmp_path: Path, name: str, use_kernels: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In blocks where these hold them: exact if symmetric, else within 1/200 of a code's step. Else in 16 bits."""
    parameters = write_checkpoint(tmp_path, name)
    loaded = load_model(resolve_model(str(tmp_path)), device=CpuDevice(use_kernels=use_kernels))
    in_blocks = use_kernels and not name.startswith(("fp8", "float8")) and not name.endswith("act-order")
    assert ("quantised matrices" in caplog.text) == (not in_blocks), caplog.text
    for parameter, numbers in parameters.items():
        if not parameter.endswith("_proj.weight"):
            continue
        found = loaded.model.get_by_name(parameter).to_float32()
        if in_blocks:
            exact = name not in ("awq", "gptq-v2", "gptq-asymmetric", "packed-asymmetric")
            assert np.abs(found - numbers).max() < (1e-6 if exact else 0.005 * 2 / 16), parameter
        else:
            assert np.allclose(found, numbers, rtol=2**-8, atol=1e-9), parameter
    assert len(loaded.weights_id) == 32


@pytest.mark.parametrize("name", ["gptq", "fp8"])
def test_experts_are_read_in_the_same_layouts(tmp_path: Path, name: str) -> None:
    """As in Qwen3-30B-A3B-GPTQ-Int4 and Qwen3-30B-A3B-FP8: a module for each expert's matrix, and a plain router."""
    parameters = write_checkpoint(tmp_path, name, model=EXPERTS)
    loaded = load_model(resolve_model(str(tmp_path)), device=CpuDevice())
    for parameter in ("model.layers.0.mlp.experts.3.down_proj.weight", "model.layers.0.mlp.gate.weight"):
        found = loaded.model.get_by_name(parameter).to_float32()
        assert np.allclose(found, parameters[parameter], rtol=2**-8, atol=1e-6), parameter


@pytest.mark.skipif(not KERNELS, reason="no kernels for this CPU, or no compiler")
def test_blocks_take_less_memory_and_are_kept_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "model", "awq")
    monkeypatch.setattr(loader, "_SETTLED_NS", 0)  # or new files would not be kept
    files, device = resolve_model(str(tmp_path / "model")), CpuDevice()
    assert device.library is not None
    cache = PackedCache(tmp_path / "cache", max_bytes=1 << 30, library=device.library, min_bytes=0)
    first, wide = load_model(files, device=device, cache=cache), load_model(files, device=device, dtype="bfloat16")
    assert first.weights_bytes < 0.5 * wide.weights_bytes
    assert first.weights_id != wide.weights_id, "other numbers"
    cache.wait()
    monkeypatch.setattr(loader, "open_weights", None)  # the files are not read again
    again = load_model(files, device=device, cache=cache)
    assert (again.weights_id, again.weights_bytes) == (first.weights_id, first.weights_bytes)


@pytest.mark.parametrize("name", REAL)
def test_shapes_of_real_checkpoints(name: str) -> None:
    quantisation = read_quantisation(Fields({"quantization_config": CONFIGS[name]}, source="config.json"))
    assert quantisation is not None
    scheme = quantisation.scheme_of("model.layers.0.mlp.down_proj")
    assert scheme is not None
    shape, tensors = REAL[name]
    marker = tensors[scheme.needed[0]]
    assert shape_of(scheme, StoredTensor("I32", marker, 0, 0)) == shape
    known = expected(scheme, shape)
    assert set(scheme.needed) <= set(tensors) <= {scheme.needed[0], *known}
    for each, found in tensors.items():
        assert each == scheme.needed[0] or found in known[each][1], each


def _stored(name: str) -> Stored:
    rng = np.random.default_rng(0)
    stored: Stored = {}
    for parameter, shape in parse_hf_config(CONFIG, {}).parameter_shapes().items():
        module = parameter.removesuffix(".weight")
        if module.endswith("_proj"):
            stored |= {f"{module}.{each}": found for each, found in draw(name, shape, rng).stored.items()}  # type: ignore[arg-type]
        else:
            stored[parameter] = ("F32", np.zeros(shape))
    return stored


DOWN = "model.layers.0.mlp.down_proj."
WRONG = [
    ("gptq", {"scales": None}, f"tensor '{DOWN}qweight' has no {DOWN}scales beside it"),
    ("gptq", {"scales": ("F16", np.zeros((2, 64)))}, r"down_proj.scales' is F16\[2, 64\].* needs F16 .*\[2, 128\]"),
    ("gptq", {"qzeros": ("I64", np.zeros((2, 16)))}, r"down_proj.qzeros' is I64\[2, 16\]"),
    ("gptq", {"g_idx": ("I32", np.arange(256) % 2)}, "down_proj.qweight' g_idx puts the inputs in another order"),
    ("gptq-act-order", {"g_idx": ("I32", np.zeros(256))}, "g_idx does not give every group 32 inputs"),
    ("packed", {"weight_shape": ("I64", np.array((128, 250)))}, r"weight_shape is \[128, 250\]"),
    ("packed", {"weight_packed": ("I32", np.zeros((128, 32, 1)))}, r"has shape \[128, 32, 1\], and codes are matrices"),
    ("packed", {"weight": ("F8_E4M3", np.zeros((128, 256)))}, "down_proj.weight' of type F8_E4M3 is not what"),
    ("fp8", {"weight_scale_inv": None}, f"has no {DOWN}weight_scale_inv beside it"),
    (
        "fp8",
        {"weight": ("I8", np.zeros((128, 256)))},
        "of type I8 is not what quantization_config says: weight of float8",
    ),
    ("fp8", {"qzeros": ("I32", np.zeros(2))}, "down_proj.qzeros' is of type I32, and belongs to no quantised module"),
    ("awq", {"weight_scale": ("F16", np.zeros(2))}, "holds tensor 'model.layers.0.mlp.down_proj.weight_scale'"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_a_wrong_tensor_is_named_with_its_file(tmp_path: Path, name: str, changes: dict, message: str) -> None:
    stored = _stored(name)
    for each, tensor in changes.items():
        stored.pop(DOWN + each, None)
        if tensor is not None:
            stored[DOWN + each] = tensor
    write_folder(tmp_path, CONFIG | {"quantization_config": CONFIGS[name]}, stored)
    with pytest.raises(ModelFileError, match=message) as caught:
        load_model(resolve_model(str(tmp_path)), device=CpuDevice(use_kernels=False))
    assert "model-00001-of-00001.safetensors" in str(caught.value)


def test_a_module_that_should_not_be_quantised_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "fp8", modules_to_not_convert=["model.layers.0.mlp.down_proj"])
    with pytest.raises(ModelFileError, match=f"{DOWN}weight' is quantised, and quantization_config says"):
        load_model(resolve_model(str(tmp_path)), device=CpuDevice(use_kernels=False))


def test_modules_that_are_left_out_are_read_as_they_are(tmp_path: Path) -> None:
    """Plain matrices among quantised ones, as `ignore` and `modules_to_not_convert` announce them."""
    stored = {name: tensor for name, tensor in _stored("packed").items() if not name.startswith(DOWN)}
    plain = np.random.default_rng(1).normal(size=(128, 256)).astype(np.float32)
    stored[DOWN + "weight"] = ("F32", plain)
    quantization = CONFIGS["packed"] | {"ignore": ["lm_head", "re:.*layers.0.mlp.down.*"]}
    write_folder(tmp_path, CONFIG | {"quantization_config": quantization}, stored)
    loaded = load_model(resolve_model(str(tmp_path)), device=CpuDevice(use_kernels=False))
    assert np.array_equal(loaded.model.get_by_name(DOWN + "weight").to_float32(), plain)


def test_tensors_without_a_config_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, _stored("gptq"))
    with pytest.raises(ModelFileError, match="qweight' is of type I32; weights are read of F64, F32, F16, BF16"):
        load_model(resolve_model(str(tmp_path)), device=CpuDevice(use_kernels=False))


def test_the_identity_names_bytes_and_layout(tmp_path: Path) -> None:
    """Other codes, another reading of the same codes, and blocks in place of numbers are other weights."""
    write_checkpoint(tmp_path / "first", "gptq-asymmetric")
    write_checkpoint(tmp_path / "other", "gptq-asymmetric", checkpoint_format="gptq_v2")
    ids = {
        load_model(resolve_model(str(tmp_path / folder)), device=CpuDevice(use_kernels=False), dtype=dtype).weights_id
        for folder in ("first", "other")
        for dtype in ("float32", "bfloat16")
    }
    assert len(ids) == 4
    config = read_config(resolve_model(str(tmp_path / "first")))
    assert "quantisation" not in repr(config), "identities of plain models stay what they were"
    assert "quantisation" in {field.name for field in fields(config)}
    assert json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]["sym"] is False
