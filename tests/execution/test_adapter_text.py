"""Greedy text of runners with LoRA adapters against transformers on merged weights: token for token in float32.

PEFT itself is not installed: the reference is its definition, W + scale * B A, merged into the weights.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from step_driver import DrivenRequest, StepDriver
from transformers import PreTrainedModel

from headwater.devices.adapters import AdapterMemory
from headwater.devices.cpu.adapters.memory import CpuAdapters
from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cuda.adapters import CudaAdapters
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels import decode as triton_decode
from headwater.devices.cuda.products import linear as cuda_linear
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.gpu_runner import GpuRunner
from headwater.models.adapters.adapter import read_adapter
from headwater.models.loader import load_model, resolve_model
from headwater.models.ranks.adapter_share import adapter_shape
from tiny_models import ADAPTED, VOCAB_SIZE, greedy_text, is_greedy_text, make_adapter, make_tiny_model, merged

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

NUM_SLOTS = 4
PROMPTS = [np.random.default_rng(length).integers(3, VOCAB_SIZE, length).tolist() for length in (5, 9, 17, 30, 3, 12)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PreTrainedModel], list[Path]]:
    """A model; itself and with each of two adapters; the adapters. One has an odd rank and few modules."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_tiny_model("llama-biases-mha", folder / "model", num_layers=2)
    few = make_adapter(model, folder / "few", rank=3, seed=1, targets=("q_proj", "v_proj", "down_proj"))
    all_modules = make_adapter(model, folder / "all", rank=4, seed=2)
    return folder / "model", [model, merged(model, few), merged(model, all_modules)], [few, all_modules]


def _fill(memory: AdapterMemory, folders: list[Path], runner: CpuRunner | GpuRunner) -> None:
    for slot, folder in enumerate(folders, 1):
        adapter = read_adapter(folder, runner.model.config, max_rank=8, form="float32")
        memory.place(slot, memory.prepare(adapter))


def _add(driver: StepDriver, index: int, *, adapter: int) -> DrivenRequest:
    request = driver.add(PROMPTS[index], slot=index)
    driver._assignments[-1] = structs.replace(driver._assignments[-1], adapter=adapter)
    return request


@pytest.mark.parametrize("use_kernels", [True, False])
def test_a_mixed_batch_has_the_text_of_each_adapter(
    setting: tuple[Path, list[PreTrainedModel], list[Path]], use_kernels: bool
) -> None:
    """A wrong column, scale, tile or slot changes the text; so does an adapter that reaches its neighbour's row."""
    folder, references, adapters = setting
    device = CpuDevice(use_kernels=use_kernels)
    loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32")
    shape = adapter_shape(loaded.config, num_slots=NUM_SLOTS, max_rank=8)
    memory = CpuAdapters(device.library, shape, form="float32")
    layout = loaded.kv_layout(page_size=4)
    runner = CpuRunner(loaded, device, layout=layout, num_pages=400, max_running=8, adapters=memory)
    _fill(memory, adapters, runner)
    driver = StepDriver(runner)
    requests = [_add(driver, index, adapter=index % 3) for index in range(6)]
    driver.run(requests, num_outputs=12, chunk=7)
    for index, request in enumerate(requests):
        assert is_greedy_text(references[index % 3], PROMPTS[index], request.outputs)
        others = [each for number, each in enumerate(references) if number != index % 3]
        assert not any(is_greedy_text(each, PROMPTS[index], request.outputs) for each in others)
    again = _add(driver, 0, adapter=2)  # the slot of a request without an adapter
    driver.run([again], num_outputs=12, chunk=7)
    assert is_greedy_text(references[2], PROMPTS[0], again.outputs)
    memory.place(1, memory.prepare(read_adapter(adapters[1], loaded.config, max_rank=8, form="float32")))
    again = _add(driver, 1, adapter=1)  # a slot with another adapter: nothing was recorded again
    driver.run([again], num_outputs=12, chunk=7)
    assert is_greedy_text(references[2], PROMPTS[1], again.outputs)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-some-dense"])
def test_adapters_beside_experts(name: str, tmp_path: Path) -> None:
    """Attention has them, and MLPs of layers without experts."""
    model = make_tiny_model(name, tmp_path / "model")
    targets = ADAPTED if name != "mixtral" else ("q_proj", "v_proj", "o_proj")
    folder = make_adapter(model, tmp_path / "adapter", rank=4, seed=3, targets=targets)
    references, device = [model, merged(model, folder)], CpuDevice()
    loaded = load_model(resolve_model(str(tmp_path / "model")), device=device, dtype="float32")
    memory = CpuAdapters(device.library, adapter_shape(loaded.config, num_slots=2, max_rank=4), form="float32")
    layout = loaded.kv_layout(page_size=4)
    runner = CpuRunner(loaded, device, layout=layout, num_pages=100, max_running=8, adapters=memory)
    _fill(memory, [folder], runner)
    driver = StepDriver(runner)
    requests = [_add(driver, index, adapter=index % 2) for index in range(4)]
    driver.run(requests, num_outputs=8, chunk=7)
    for index, request in enumerate(requests):
        assert is_greedy_text(references[index % 2], PROMPTS[index], request.outputs)
        assert not is_greedy_text(references[1 - index % 2], PROMPTS[index], request.outputs)


@pytest.mark.gpu
def test_a_gpu_has_the_same_text(
    setting: tuple[Path, list[PreTrainedModel], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU, the kernels run under Triton's interpreter."""
    folder, references, adapters = setting
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton_decode, "split_limits", lambda *_: (2, 64))
        never: Callable[..., bool] = lambda *_: False  # noqa: E731
        monkeypatch.setattr(cuda_linear, "suits", never)
        monkeypatch.setattr(cuda_linear, "suits_gated", never)
    device = CudaDevice(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32")
    shape = adapter_shape(loaded.config, num_slots=NUM_SLOTS, max_rank=8)
    memory = CudaAdapters(shape, form="float32", device=device.torch_device)
    layout = loaded.kv_layout(page_size=4)
    sizes = {"num_pages": 100, "max_running": 8, "max_drafted": 4}
    runner = GpuRunner(loaded, device, layout=layout, adapters=memory, prompt_graph_sizes=((4, 16),), **sizes)
    _fill(memory, adapters, runner)
    driver = StepDriver(runner)  # type: ignore[arg-type]
    chosen = {0: 2, 4: 1}  # prompts of 5 and 3 tokens, as interpreted kernels are slow
    requests = {index: _add(driver, index, adapter=adapter) for index, adapter in chosen.items()}
    driver.run(list(requests.values()), num_outputs=2, chunk=9)
    draft = greedy_text(references[chosen[0]], PROMPTS[0], 3)[2:]
    driver.step([(request, 1) for request in requests.values()], {requests[0].slot: draft})
    assert requests[0].num_accepted == 1 and [len(it.outputs) for it in requests.values()] == [4, 3]
    for index, adapter in chosen.items():
        outputs = requests[index].outputs
        found = [each for each in range(3) if is_greedy_text(references[each], PROMPTS[index], outputs)]
        assert found == [adapter]
