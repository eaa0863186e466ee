"""The families beyond Llama and Qwen against transformers, token for token in float32: steps, and the whole engine."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

from msgspec import structs  # noqa: E402
from test_golden_engine import NUM_OUTPUTS, PATIENCE_S, RealEngine, _prompts  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from headwater.devices.cpu.adapters.memory import CpuAdapters  # noqa: E402
from headwater.devices.cpu.device import CpuDevice  # noqa: E402
from headwater.execution.cpu_runner import CpuRunner  # noqa: E402
from headwater.messages.control import FlushCache  # noqa: E402
from headwater.messages.generation import LogprobParams  # noqa: E402
from headwater.models.adapters.adapter import read_adapter  # noqa: E402
from headwater.models.decoder import DecoderModel  # noqa: E402
from headwater.models.loader import load_model, resolve_model  # noqa: E402
from headwater.models.ranks.adapter_share import adapter_shape  # noqa: E402
from tiny_models import (  # noqa: E402
    ADAPTED,
    FAMILY_NAMES,
    VOCAB_SIZE,
    is_greedy_text,
    make_adapter,
    make_tiny_model,
    merged,
    served_parameters,
)

sys.path.append(str(Path(__file__).parents[1] / "execution"))
from step_driver import StepDriver  # noqa: E402

PROMPT_LENGTHS = (1, 3, 16, 33, 47, 70)
Family = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="module", params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_tiny_model(request.param, folder)


def test_chunks_and_batches_give_the_text_of_transformers(family: Family) -> None:
    """A lost multiplier, norm, window or rotation changes the text; by the kernels and in numpy."""
    folder, reference = family
    random = np.random.default_rng(7)
    prompts = [random.integers(3, VOCAB_SIZE, length).tolist() for length in PROMPT_LENGTHS]
    expected: list[list[int]] = []
    for has_kernels, page_size, chunk, batch_size in ((True, 16, 1000, 6), (True, 3, 9, 4), (False, 5, 19, 6)):
        device = CpuDevice(num_threads=1, use_kernels=has_kernels)
        loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32")
        if page_size > 3:
            _assert_parameters_have_their_names(loaded.model, reference)
        layout = loaded.kv_layout(page_size=page_size)
        runner = CpuRunner(loaded, device, layout=layout, num_pages=400, max_running=6)
        outputs = []
        for start in range(0, len(prompts), batch_size):
            driver = StepDriver(runner, seed=start)
            some = prompts[start : start + batch_size]
            logprobs = LogprobParams(top=1)
            requests = [driver.add(prompt, slot=slot, logprobs=logprobs) for slot, prompt in enumerate(some)]
            driver.run(requests, num_outputs=NUM_OUTPUTS, chunk=chunk)
            outputs += [it.outputs for it in requests]
            last = requests[-1]
        found = torch.tensor([it.logprob for it in last.logprobs])
        assert torch.allclose(found, _logprobs(reference, last.prompt, last.outputs), atol=2e-4)
        expected = expected or outputs
        assert outputs == expected
    assert len({token for text in expected for token in text}) > 12, "degenerate text would prove nothing"
    for prompt, output in zip(prompts, expected, strict=True):
        assert is_greedy_text(reference, prompt, output)


def _assert_parameters_have_their_names(model: DecoderModel, reference: PreTrainedModel) -> None:
    """As a trainer reads and writes them: a fused matrix is one under the name that it has in the checkpoint."""
    named = {name: array.to_float32() for name, array in model.iter_named()}
    expected = served_parameters(reference)
    assert set(named) == set(expected)
    for name, parameter in expected.items():
        np.testing.assert_array_equal(named[name], parameter.numpy())
        np.testing.assert_array_equal(model.get_by_name(name).to_float32(), named[name])


@torch.inference_mode()
def _logprobs(model: PreTrainedModel, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Of each token of the output: they show what multiplies all logits alike."""
    logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1).gather(1, torch.tensor(output)[:, None])[:, 0]


def test_prefixes_and_pages_from_host_memory_give_the_same_text(family: Family) -> None:
    """A cached key that a layer rotates, hides or scales in another way would change the text that follows it."""
    folder, reference = family
    prompts = _prompts(6, VOCAB_SIZE)
    engine = RealEngine(folder, num_pages=200, num_host_pages=200)
    engine.parts.cache.lower.restore_cost.is_worth = lambda num_tokens: True  # the clock stands still
    for lap in range(2):
        for index, prompt in enumerate(prompts):
            engine.generate(f"{lap}-{index}", prompt)
            engine.turn(3)  # later ones find the prompts before them
        engine.finish()
        last_s = time.monotonic() + PATIENCE_S
        while engine.parts.blockers():  # threads copy
            assert time.monotonic() < last_s, engine.parts.blockers()
            engine.turn()
            time.sleep(0.001)
        engine.send(FlushCache(call_id=f"flush-{lap}", mode="now", tiers=("device",)))
        engine.turn(2)
    for index, prompt in enumerate(prompts):
        text = engine.tokens[f"0-{index}"]
        assert len(text) == NUM_OUTPUTS and is_greedy_text(reference, prompt, text), f"prompt {index}"
        assert engine.tokens[f"1-{index}"] == text
    counters = engine.parts.scheduler.counters
    assert counters.cached_tokens_device > 0 and counters.cached_tokens_host > 0


@pytest.mark.parametrize("use_kernels", [True, False])
@pytest.mark.parametrize("name", ["phi3", "gemma3"])
def test_adapters_of_fused_matrices_and_before_norms(name: str, use_kernels: bool, tmp_path: Path) -> None:
    """An adapter of a fused matrix has one A for all its parts; a norm behind a block norms the adapter's part too."""
    reference = make_tiny_model(name, tmp_path / "model", num_layers=3)
    targets = (*ADAPTED, "qkv_proj", "gate_up_proj")
    present = [target for target in targets if any(f".{target}." in each for each, _ in reference.named_parameters())]
    folder = make_adapter(reference, tmp_path / "adapter", rank=3, seed=1, targets=present)
    device = CpuDevice(num_threads=1, use_kernels=use_kernels)
    loaded = load_model(resolve_model(str(tmp_path / "model")), device=device, dtype="float32")
    memory = CpuAdapters(device.library, adapter_shape(loaded.config, num_slots=2, max_rank=4), form="float32")
    memory.place(1, memory.prepare(read_adapter(folder, loaded.config, max_rank=4, form="float32")))
    layout = loaded.kv_layout(page_size=4)
    driver = StepDriver(CpuRunner(loaded, device, layout=layout, num_pages=60, max_running=2, adapters=memory))
    prompts = [list(range(5, 25)), list(range(40, 70))]
    requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate(prompts)]
    driver._assignments[-1] = structs.replace(driver._assignments[-1], adapter=1)
    driver.run(requests, num_outputs=8, chunk=11)
    adapted = merged(reference, folder)
    assert is_greedy_text(reference, prompts[0], requests[0].outputs)
    assert is_greedy_text(adapted, prompts[1], requests[1].outputs)
    assert not is_greedy_text(reference, prompts[1], requests[1].outputs)
