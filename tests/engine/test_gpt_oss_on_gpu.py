"""gpt-oss by the GPU's kernels, with experts in MXFP4, against transformers in float32; interpreted without a card."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels import decode as triton_decode
from headwater.devices.cuda.products import linear as cuda_linear
from headwater.devices.host_tensor import HostTensor
from headwater.execution.gpu_runner import GpuRunner
from headwater.models.loader import load_model, resolve_model
from interpreted_triton import exact_dots
from tiny_models import is_greedy_text

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("execution", "models/experts")]
from mxfp4_files import TINY, draw_tensors, widened, write_folder
from step_driver import StepDriver

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]
IS_GPU = torch.cuda.is_available()
CONFIG = TINY | {
    "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5,
    "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "hidden_size": 32,
    "intermediate_size": 32,
}  # fmt: skip


def _reference() -> PreTrainedModel:
    raw = {key: value for key, value in CONFIG.items() if key not in ("quantization_config", "rope_scaling")}
    raw["rope_parameters"] = CONFIG["rope_scaling"] | {"rope_theta": raw.pop("rope_theta")}
    model = GptOssForCausalLM(GptOssConfig(**raw)).eval()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in widened(_tensors()).items()})
    return model


def _tensors() -> dict[str, np.ndarray]:
    return draw_tensors(CONFIG, seed=4)


def test_text_of_experts_in_mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks beside decodes; contexts beyond the window."""
    if not IS_GPU:
        exact_dots(monkeypatch)
        monkeypatch.setattr(triton_decode, "split_limits", lambda *_: (2, 64))
        for name in ("suits", "suits_gated"):  # the kernel of few tokens takes most of the time
            monkeypatch.setattr(cuda_linear, name, lambda *_: False)
    monkeypatch.setattr(CudaDevice, "auto_dtype", lambda _: "float32")  # all but the experts
    folder = write_folder(tmp_path, _tensors(), CONFIG)
    device = CudaDevice(torch.device("cuda" if IS_GPU else "cpu"))
    loaded = load_model(resolve_model(str(folder)), device=device)
    numbers = sum(2 * values.size for name, values in _tensors().items() if name.endswith("_blocks"))
    assert loaded.weights_bytes < 17 * numbers // 32 + 4 * 40_000
    found = device.to_host(loaded.model.get_by_name("model.layers.1.mlp.experts.2.down_proj.weight"))
    assert isinstance(found, HostTensor) and found.format == "MXFP4"
    layout = loaded.kv_layout(page_size=4)
    runner = GpuRunner(loaded, device, layout=layout, num_pages=40, max_running=2, max_context=64, graph_sizes=())
    driver = StepDriver(runner)  # type: ignore[arg-type]
    prompts = [np.random.default_rng(2).integers(3, CONFIG["vocab_size"], length).tolist() for length in (3, 9)]
    requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate(prompts)]
    driver.run(requests, num_outputs=24 if IS_GPU else 3, chunk=7)
    reference = _reference()
    for each in requests:
        assert is_greedy_text(reference, each.prompt, each.outputs)
