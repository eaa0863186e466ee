"""Greedy text of the runner against transformers' generate: token for token in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
from step_driver import StepDriver
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from headwater.devices.cpu.device import CpuDevice
from headwater.execution.cpu_runner import CpuRunner
from headwater.launch.default_model import ensure_default_model
from headwater.models.loader import load_model, resolve_model
from headwater.tokenization.tokenizer import Tokenizer
from tiny_gguf import quick_reader, read_once
from tiny_models import MODEL_NAMES, VOCAB_SIZE, greedy_text, is_greedy_text, make_tiny_model

pytestmark = pytest.mark.slow

NUM_OUTPUTS = 24
TEXT = "<|im_start|>user\nTell me something about {}, in detail.<|im_end|>\n<|im_start|>assistant\n"
SUBJECTS = ("rivers", "the number 12345", "Python lists", "photosynthesis", "trains in Japan")
PROMPT_LENGTHS = (1, 2, 3, 5, 8, 13, 17, 31, 32, 33, 40, 47, 64, 65, 90, 110)


def _prompts(seed: int = 7) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCAB_SIZE, length).tolist() for length in PROMPT_LENGTHS]


def _runner(folder: Path, *, page_size: int, dtype: str = "float32", max_running: int = 16) -> CpuRunner:
    device = CpuDevice()
    loaded = load_model(resolve_model(str(folder)), device=device, dtype=dtype)
    return CpuRunner(
        loaded, device, layout=loaded.kv_layout(page_size=page_size), num_pages=1200, max_running=max_running
    )


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_tiny_models_match_transformers_in_any_chunks_and_batches(name: str, tmp_path: Path) -> None:
    """A wrong rotation, mask, page, bias or tied head changes the text of some prompt."""
    reference = make_tiny_model(name, tmp_path)
    prompts = _prompts()
    expected: list[list[int]] = []
    for page_size, chunk, batch_size in ((16, 1000, 16), (4, 7, 5), (5, 19, 16), (1, 33, 16)):
        runner = _runner(tmp_path, page_size=page_size)
        for start in range(0, len(prompts), batch_size):
            driver = StepDriver(runner, seed=start)
            requests = [driver.add(prompts[start + i], slot=i) for i in range(min(batch_size, 16 - start))]
            driver.run(requests, num_outputs=NUM_OUTPUTS, chunk=chunk)
            outputs = [it.outputs for it in requests]
            expected = expected or outputs
            assert outputs == expected[start : start + batch_size]
    assert len({token for text in expected for token in text}) > 20, "degenerate text would prove nothing"
    assert expected[0] == greedy_text(reference, prompts[0], NUM_OUTPUTS)
    for prompt, output in zip(prompts, expected, strict=True):
        assert is_greedy_text(reference, prompt, output)


def test_requests_that_come_and_go_do_not_change_each_other(tmp_path: Path) -> None:
    """A slot reused too early, or a stale page table, would change the text of a request that joins late."""
    reference = make_tiny_model("llama", tmp_path)
    prompts = _prompts(seed=11)
    driver = StepDriver(_runner(tmp_path, page_size=8))
    waiting = list(range(len(prompts)))
    running = {}
    done = {}
    while waiting or running:
        free = [slot for slot in range(3) if slot not in running]
        if waiting and free:  # one joins per step, so the batch always mixes prefill chunks and decodes
            index = waiting.pop(0)
            running[free[0]] = (index, driver.add(prompts[index], slot=free[0]))
        driver.step([(it, driver.next_tokens(it, 9)) for _, it in running.values()])
        for slot, (index, it) in list(running.items()):
            if len(it.outputs) == NUM_OUTPUTS:
                done[index] = it.outputs
                del running[slot]
    assert all(is_greedy_text(reference, prompt, done[index]) for index, prompt in enumerate(prompts))


@pytest.mark.parametrize("name", ["llama-biases-mha", "qwen3"])
def test_float16_runs_and_stays_close(name: str, tmp_path: Path) -> None:
    """float16 is offered by --dtype; its first tokens must be float32's."""
    reference = make_tiny_model(name, tmp_path)
    prompts = _prompts()
    driver = StepDriver(_runner(tmp_path, page_size=16, dtype="float16"))
    requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate(prompts)]
    driver.run(requests, num_outputs=4, chunk=20)
    expected = [greedy_text(reference, prompt, 4) for prompt in prompts]
    assert sum(it.outputs == text for it, text in zip(requests, expected, strict=True)) >= 14


def test_a_retracted_request_goes_on_with_the_same_text(tmp_path: Path) -> None:
    """After a retraction the generated tokens are computed again as part of the prompt."""
    reference = make_tiny_model("qwen2", tmp_path)
    prompt = _prompts()[8]
    expected = greedy_text(reference, prompt, NUM_OUTPUTS)
    driver = StepDriver(_runner(tmp_path, page_size=4))
    before = driver.add(prompt, slot=0)
    driver.run([before], num_outputs=10, chunk=6)
    after = driver.add([*prompt, *before.outputs], slot=2, num_prompt_tokens=len(prompt))
    driver.run([after], num_outputs=NUM_OUTPUTS - 10, chunk=6)
    assert before.outputs + after.outputs == expected


@pytest.mark.oracle
@pytest.mark.timeout(900)  # two models in float32; minutes where other processes take the cores
def test_the_default_model_matches_transformers_on_the_same_file() -> None:
    """5 texts of 24 tokens out of the quantised GGUF: dequantisation, row order and tied head are right.

    Chunks, batches and pages are crossed; that any of them gives the same text is a matter of the tiny models.
    """
    path = ensure_default_model()
    tokenizer = Tokenizer.load(path)
    prompts = [tokenizer.encode(TEXT.format(subject)) for subject in SUBJECTS]
    with read_once():
        runner = _runner(path, page_size=16, max_running=len(prompts))
        with quick_reader():
            reference = _load_gguf_with_transformers(path)
    driver = StepDriver(runner)
    requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate(prompts)]
    driver.run(requests, num_outputs=NUM_OUTPUTS, chunk=37)
    for prompt, request in zip(prompts, requests, strict=True):
        assert is_greedy_text(reference, prompt, request.outputs)


def _load_gguf_with_transformers(path: Path) -> PreTrainedModel:
    """transformers' own reading of the file, without the package that `from_pretrained` wants for it."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    model = skeleton.to_empty(device="cpu").eval()  # no random weights, which take three seconds
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    left = model.load_state_dict(tensors, strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys
    model.tie_weights()
    return model
