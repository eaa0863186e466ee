"""The asynchronous runner where another backend computes long prompts. Without a GPU, interpreted: short texts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from step_driver import StepDriver

from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels import decode as triton_decode
from headwater.devices.cuda.products import linear as cuda_linear
from headwater.execution.gpu_runner import GpuRunner
from headwater.models.loader import load_model, resolve_model
from tiny_models import VOCAB_SIZE, greedy_text, make_tiny_model
from torch_external_attention import TorchExternalAttention

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    # what padding tokens compute is undefined, and the interpreter tells of it
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

PROMPT = np.random.default_rng(1).integers(3, VOCAB_SIZE, 21).tolist()


def test_greedy_text_with_external_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts behind decodes and chunks, chunks of them, and steps small enough for a graph, which have none."""
    if not torch.cuda.is_available():  # interpreted, these take most of the time: see test_gpu_runner.py
        monkeypatch.setattr(triton_decode, "split_limits", lambda *_: (2, 64))
        monkeypatch.setattr(cuda_linear, "suits", lambda *_: False)
        monkeypatch.setattr(cuda_linear, "suits_gated", lambda *_: False)
    reference = make_tiny_model("qwen3", tmp_path, num_layers=2)
    device = CudaDevice(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device.external_attention = backend = TorchExternalAttention()
    device.min_external_tokens = 5
    loaded = load_model(resolve_model(str(tmp_path)), device=device, dtype="float32")
    runner = GpuRunner(
        loaded,
        device,
        layout=loaded.kv_layout(page_size=4),
        num_pages=64,
        max_running=8,
        max_context=64,
        prompt_graph_sizes=((0, 4), (4, 4)),
    )
    driver = StepDriver(runner)  # type: ignore[arg-type]
    prompts = [PROMPT[:9], PROMPT[2:14], PROMPT[5:8], PROMPT[:6], PROMPT[3:5]]
    requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate(prompts)]
    first, long, short, late, last = requests
    driver.step([(long, 7), (first, 9)])
    driver.step([(first, 1), (long, 5), (short, 3), (late, 6)])
    driver.step([(first, 1), (long, 1), (last, 2)])
    driver.run(requests, num_outputs=4)
    num_layers = loaded.config.num_layers
    by_step = [[(7, 7), (9, 9)], [(5, 12), (3, 3), (6, 6)]]
    assert backend.seen == [seen for seen in by_step for _ in range(num_layers)]
    assert [it.outputs[:4] for it in requests] == [greedy_text(reference, prompt, 4) for prompt in prompts]
