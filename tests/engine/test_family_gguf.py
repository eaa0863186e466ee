"""GGUF files of the families beyond Llama and Qwen: the text is that of the folder they were made from."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

from headwater.devices.cpu.device import CpuDevice  # noqa: E402
from headwater.devices.cuda.device import CudaDevice  # noqa: E402
from headwater.devices.device import Device  # noqa: E402
from headwater.execution.cpu_runner import CpuRunner  # noqa: E402
from headwater.models.config import read_hf_config  # noqa: E402
from headwater.models.loader import load_model, read_config, resolve_model  # noqa: E402
from headwater.models.model_files import ModelFileError  # noqa: E402
from tiny_gguf import write_gguf_model  # noqa: E402
from tiny_models import is_greedy_text, make_tiny_model, served_parameters  # noqa: E402

sys.path.append(str(Path(__file__).parents[1] / "execution"))
from step_driver import StepDriver  # noqa: E402

# name: layers, changes of the config to what llama.cpp takes for granted, and what its converter writes
GEMMA3_ROPE = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
FAMILIES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "granite": (
        2,
        {},
        {
            "granite.embedding_scale": 3.0,
            "granite.residual_scale": 0.22,
            "granite.attention.scale": 0.11,
            "granite.logit_scale": 3.0,
        },
    ),
    "smollm3": (5, {"no_rope_layer_interval": 4}, {}),
    "gemma3": (
        7,
        {"layer_types": None, "rope_parameters": GEMMA3_ROPE, "query_pre_attn_scalar": 24},
        {"gemma3.attention.sliding_window": 13, "gemma3.attention.value_length": 24},
    ),
    "gpt-oss": (
        3,
        {"hidden_size": 64, "intermediate_size": 96},
        {
            "gpt-oss.attention.sliding_window": 13,
            "gpt-oss.attention.value_length": 24,
            "gpt-oss.rope.scaling.type": "yarn",
            "gpt-oss.rope.scaling.factor": 4.0,
            "gpt-oss.rope.scaling.original_context_length": 64,
        },
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_has_the_text_of_its_folder(name: str, tmp_path: Path) -> None:
    """A row out of order, a norm without its one, a layer with another window or angle changes the text."""
    num_layers, changes, metadata = FAMILIES[name]
    reference = make_tiny_model(name, tmp_path / "folder", num_layers=num_layers, **changes)
    config = read_hf_config(tmp_path / "folder")
    parameters = served_parameters(reference)
    path = write_gguf_model(tmp_path / "model.gguf", config, name, parameters, metadata=metadata)
    found = read_config(resolve_model(str(path)))
    for layer in range(num_layers):
        assert found.rope_of(layer) == config.rope_of(layer) and found.window_of(layer) == config.window_of(layer)
    device = CpuDevice(num_threads=1)
    loaded = load_model(resolve_model(str(path)), device=device, dtype="float32")
    layout = loaded.kv_layout(page_size=4)
    driver = StepDriver(CpuRunner(loaded, device, layout=layout, num_pages=60, max_running=2))
    prompts = [list(range(5, 35)), [9, 50, 77]]
    requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate(prompts)]
    driver.run(requests, num_outputs=12, chunk=11)
    for prompt, request in zip(prompts, requests, strict=True):
        assert is_greedy_text(reference, prompt, request.outputs)
    more = {**metadata, f"{name}.attention.key_length_swa": 8}
    unknown = write_gguf_model(tmp_path / "unknown.gguf", config, name, parameters, metadata=more)
    with pytest.raises(ModelFileError, match=f"{name}.attention.key_length_swa 8 is not known"):
        read_config(resolve_model(str(unknown)))


@pytest.mark.parametrize("device", [CpuDevice(num_threads=1), CudaDevice(torch.device("cpu"))], ids=["cpu", "cuda"])
def test_experts_of_a_file_in_mxfp4_stay_so(device: Device, tmp_path: Path) -> None:
    num_layers, changes, metadata = FAMILIES["gpt-oss"]
    reference = make_tiny_model("gpt-oss", tmp_path / "folder", num_layers=num_layers, **changes)
    parameters, config = served_parameters(reference), read_hf_config(tmp_path / "folder")
    path = write_gguf_model(
        tmp_path / "model.gguf", config, "gpt-oss", parameters, metadata=metadata, block_format="MXFP4"
    )
    loaded = load_model(resolve_model(str(path)), device=device)
    blocks = sum(values.numel() for name, values in parameters.items() if ".experts." in name and values.dim() == 2)
    others = sum(values.numel() for values in parameters.values()) - blocks
    assert loaded.weights_bytes == blocks * 17 // 32 + 2 * others
    for which in ("gate", "down"):
        name = f"model.layers.1.mlp.experts.4.{which}_proj.weight"
        values = parameters[name].numpy()
        expected = dequantize(quantize(values, GGMLQuantizationType.MXFP4), GGMLQuantizationType.MXFP4)
        found = device.to_host(loaded.model.get_by_name(name)).to_float32()
        np.testing.assert_array_equal(found, expected.reshape(values.shape))
