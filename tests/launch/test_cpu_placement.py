"""What an engine on a CPU reports about its computing, on a tiny model with random weights."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import kernel_library
from headwater.launch.config import ServerArgs
from headwater.launch.cpu_placement import CpuPlacement
from headwater.messages.state import ComputeFacts
from headwater.models.loader import load_model, resolve_model
from headwater.scheduling.plan import StepPlan

pytestmark = pytest.mark.slow
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
NUM_WEIGHTS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96) + 300 * 64


def facts_of(folder: Path, *, quantization: str = "none", **device: object) -> ComputeFacts:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    placement = CpuPlacement(CpuDevice(**device))  # type: ignore[arg-type]
    loaded = load_model(
        resolve_model(str(folder)), device=placement.device, load_format="dummy", quantization=quantization
    )  # type: ignore[arg-type]
    args = ServerArgs().for_device("cpu")
    layout = loaded.kv_layout(page_size=16)
    runner = placement.make_runner(args, loaded, layout=layout, num_pages=16, max_context=256)
    placement.warm_up(args, runner, steps=runner, max_context=256)
    return placement.compute_facts(runner, loaded, steps=runner)


@pytest.mark.skipif(kernel_library() is None, reason="no CPU kernels here")
def test_formats_bytes_and_speed(tmp_path: Path) -> None:
    library = kernel_library()
    assert library is not None
    facts = facts_of(tmp_path, num_threads=1)
    assert facts.instruction_set == library.isa.name
    assert facts.kernels in ("shipped", "compiled here")
    assert (facts.num_threads, facts.is_pinned) == (1, False)
    assert (facts.weight_formats, facts.is_quantized_here) == (("bfloat16",), False)
    assert NUM_WEIGHTS * 2 <= facts.token_bytes < NUM_WEIGHTS * 2.2, "blocks of 16 outputs are filled up"
    assert facts.decode_s > 0
    assert facts.tokens_per_s < 1 / facts.decode_s
    int8 = facts_of(tmp_path, num_threads=1, quantization="int8")
    assert (int8.weight_formats, int8.is_quantized_here) == (("Q8_0",), True)
    assert int8.token_bytes < 0.6 * facts.token_bytes


def test_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_NATIVE", "0")
    facts = facts_of(tmp_path)
    assert (facts.instruction_set, facts.kernels) == ("", "unset HEADWATER_NATIVE")
    assert (facts.weight_formats, facts.token_bytes, facts.read_gb_s) == (("float32",), 0, 0.0)
    assert facts.decode_s > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_first_steps_fit_the_context_that_is_served(device: str) -> None:
    """A runner has page tables for that context, which may be far shorter than the model's."""
    from headwater.launch.cuda_placement import CudaPlacement  # here: it imports Triton

    plans: list[StepPlan] = []

    class Steps:
        def launch(self, plan: StepPlan) -> Mock:
            plans.append(plan)
            return Mock()

    runner = Mock()
    runner.model.config.max_context, runner.kv.layout.page_size = 1 << 17, 16
    placement = CpuPlacement(Mock()) if device == "cpu" else CudaPlacement(Mock())
    for max_context in (2, 64, 1000):
        plans.clear()
        args = ServerArgs().for_device(device)
        placement.warm_up(args, runner, steps=Steps(), max_context=max_context)
        longest = max(int(plan.num_computed[0] + plan.num_tokens[0]) for plan in plans)
        assert longest <= max_context
        assert all(len(update.pages) <= -(-max_context // 16) for plan in plans for update in plan.page_updates)
