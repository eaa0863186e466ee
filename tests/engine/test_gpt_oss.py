"""gpt-oss with experts in MXFP4 against transformers, which dequantises them: steps, chunks and batches."""

import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

import sys  # noqa: E402

from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel  # noqa: E402
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402

from headwater.devices.cpu.device import CpuDevice  # noqa: E402
from headwater.execution.cpu_runner import CpuRunner  # noqa: E402
from headwater.models.loader import DtypeName, load_model, resolve_model  # noqa: E402
from tiny_models import is_greedy_text  # noqa: E402

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("execution", "models/experts")]
from mxfp4_files import TINY, draw_tensors, write_folder  # noqa: E402
from step_driver import DrivenRequest, StepDriver  # noqa: E402

PROMPT_LENGTHS = (1, 12, 13, 14, 40, 70)
NUM_OUTPUTS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("gpt-oss"), draw_tensors(seed=3))


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    """The same numbers as transformers' own reader of MXFP4 makes them, in float32."""
    raw = {key: value for key, value in TINY.items() if key != "quantization_config"}
    raw["rope_parameters"] = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    model = GptOssForCausalLM(GptOssConfig(**json.loads(json.dumps(raw)))).eval()
    tensors = {name: torch.from_numpy(values) for name, values in draw_tensors(seed=3).items()}
    for name in [name for name in tensors if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        blocks, scales = tensors.pop(name), tensors.pop(stem + "_scales")
        tensors[stem] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    model.load_state_dict(tensors)
    return model


def run(folder: Path, *, dtype: DtypeName, use_kernels: bool, chunk: int) -> list[DrivenRequest]:
    device = CpuDevice(num_threads=1, use_kernels=use_kernels)
    loaded = load_model(resolve_model(str(folder)), device=device, dtype=dtype)
    runner = CpuRunner(loaded, device, layout=loaded.kv_layout(page_size=5), num_pages=200, max_running=6)
    driver = StepDriver(runner)
    random = np.random.default_rng(2)
    prompts = [random.integers(3, TINY["vocab_size"], length).tolist() for length in PROMPT_LENGTHS]
    requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate(prompts)]
    driver.run(requests, num_outputs=NUM_OUTPUTS, chunk=chunk)
    return requests


@pytest.mark.parametrize(("use_kernels", "chunk"), [(True, 1000), (True, 9), (False, 19)])
def test_widened_experts_give_the_text_of_transformers(
    folder: Path, reference: PreTrainedModel, use_kernels: bool, chunk: int
) -> None:
    requests = run(folder, dtype="float32", use_kernels=use_kernels, chunk=chunk)
    assert len({token for each in requests for token in each.outputs}) > 12, "degenerate text would prove nothing"
    for each in requests:
        assert is_greedy_text(reference, each.prompt, each.outputs)


def test_experts_that_stay_in_mxfp4_nearly_always_agree(folder: Path, reference: PreTrainedModel) -> None:
    """Teacher-forced: where the text differs, transformers finds both tokens about equally good.

    Weights of experts are exact. Their activations are rounded to 8 bits, and other weights to bfloat16, which alone
    changes one token in twelve of this random model.
    """
    requests = run(folder, dtype="auto", use_kernels=True, chunk=1000)
    is_equal: list[bool] = []
    gaps: list[float] = []
    for each in requests:
        with torch.inference_mode():
            logits = reference(torch.tensor([[*each.prompt, *each.outputs]])).logits[0, len(each.prompt) - 1 : -1]
        outputs = torch.tensor(each.outputs)
        is_equal += (logits.argmax(dim=-1) == outputs).tolist()
        lost = logits.max(dim=-1).values - logits.gather(1, outputs[:, None])[:, 0]
        gaps += (lost / logits.std(dim=-1)).tolist()
    assert np.mean(is_equal) > 0.8 and np.mean(gaps) < 0.03
    chunked = run(folder, dtype="auto", use_kernels=True, chunk=9)
    assert [each.outputs for each in chunked] == [each.outputs for each in requests]


@pytest.mark.parametrize(
    "ending", ["sinks", "router.bias", "gate_up_proj_bias", "down_proj_bias", "q_proj.bias"]
)
def test_a_forgotten_parameter_would_be_seen(
    tmp_path: Path, folder: Path, reference: PreTrainedModel, ending: str
) -> None:
    """A sink of minus infinity is none; a bias of zeros is none. Without them the text must be another one."""
    changed = {
        name: np.full_like(values, -1e30 if ending.endswith("sinks") else 0) if name.endswith(ending) else values
        for name, values in draw_tensors(seed=3).items()
    }
    requests = run(write_folder(tmp_path, changed), dtype="float32", use_kernels=True, chunk=1000)
    assert not all(is_greedy_text(reference, each.prompt, each.outputs) for each in requests)


@pytest.mark.parametrize("window", [12, 14])
def test_a_window_off_by_one_would_be_seen(tmp_path: Path, reference: PreTrainedModel, window: int) -> None:
    changed = write_folder(tmp_path, draw_tensors(seed=3), sliding_window=window)
    requests = run(changed, dtype="float32", use_kernels=True, chunk=1000)
    assert not all(is_greedy_text(reference, each.prompt, each.outputs) for each in requests)
