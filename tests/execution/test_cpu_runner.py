"""The runner beyond greedy text: log-probabilities, seeds, bad logits, the plan's edge cases."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from step_driver import StepDriver
from transformers import PreTrainedModel

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.program import Program, StepArrays
from headwater.devices.cpu.topology import num_usable_cores
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.warm_up import chunk_sizes, warm_up
from headwater.messages.generation import LogprobParams, SamplingParams
from headwater.models.loader import load_model, resolve_model
from tiny_models import VOCAB_SIZE, make_tiny_model

pytestmark = pytest.mark.slow

PROMPT = np.random.default_rng(1).integers(3, VOCAB_SIZE, 37).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, PreTrainedModel]]:
    folder = tmp_path_factory.mktemp("tiny")
    before = torch.get_num_threads()
    yield folder, make_tiny_model("qwen2", folder)
    torch.set_num_threads(before)


def _runner(
    folder: Path, *, page_size: int = 8, num_pages: int = 64, max_running: int = 8, num_threads: int | None = None
) -> CpuRunner:
    device = CpuDevice(num_threads=num_threads)
    loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32")
    return CpuRunner(
        loaded, device, layout=loaded.kv_layout(page_size=page_size), num_pages=num_pages, max_running=max_running
    )


def test_one_thread_and_more_threads_than_cores_give_the_same_bits(tiny: tuple[Path, PreTrainedModel]) -> None:
    found = []
    for num_threads in (1, 2 * num_usable_cores() + 1):
        driver = StepDriver(_runner(tiny[0], num_threads=num_threads))
        requests = [driver.add(PROMPT[slot:], slot=slot, logprobs=LogprobParams(top=1)) for slot in range(3)]
        driver.run(requests, num_outputs=8, chunk=10)
        found.append([request.logprobs for request in requests])
    assert found[0] == found[1]


@torch.inference_mode()
def _reference_logprobs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """log softmax at each position. [len(token_ids), vocab]"""
    return model(torch.tensor([token_ids])).logits[0].float().log_softmax(dim=-1)


def test_output_logprobs_are_of_the_raw_logits(tiny: tuple[Path, PreTrainedModel]) -> None:
    """Penalties and temperature change what is drawn, never the log-probability that is told."""
    folder, reference = tiny
    driver = StepDriver(_runner(folder))
    sampling = SamplingParams(temperature=1.5, seed=4, frequency_penalty=1.0, logit_bias={5: 3.0})
    wanted = LogprobParams(top=4, token_ids=(9, 5))
    request = driver.add(PROMPT, slot=1, sampling=sampling, logprobs=wanted)
    driver.run([request, driver.add(PROMPT[:3], slot=0)], num_outputs=6, chunk=10)
    expected = _reference_logprobs(reference, PROMPT + request.outputs)[len(PROMPT) - 1 :]
    assert len(request.logprobs) == 6
    for step, found in enumerate(request.logprobs):
        assert found.token_id == request.outputs[step]
        assert found.logprob == pytest.approx(float(expected[step, found.token_id]), abs=1e-4)
        values, ids = expected[step].topk(4)
        assert list(found.top_ids) == ids.tolist()
        assert list(found.top_logprobs) == pytest.approx(values.tolist(), abs=1e-4)
        assert list(found.ids_logprobs) == pytest.approx(expected[step, [9, 5]].tolist(), abs=1e-4)


@pytest.mark.parametrize("prompt_start", [0, 1, 20, 36])
@pytest.mark.parametrize("chunk", [1000, 5])
def test_prompt_logprobs_cover_each_position_once(
    tiny: tuple[Path, PreTrainedModel], prompt_start: int, chunk: int
) -> None:
    """Off by one at a chunk's border would lose or double a position."""
    folder, reference = tiny
    driver = StepDriver(_runner(folder))
    request = driver.add(PROMPT, slot=0, logprobs=LogprobParams(top=2, prompt_start=prompt_start))
    driver.run([request], num_outputs=2, chunk=chunk)
    first = max(1, prompt_start)  # nothing predicts position 0
    expected = _reference_logprobs(reference, PROMPT)
    assert [it.token_id for it in request.prompt_logprobs] == PROMPT[first:]
    for position, found in enumerate(request.prompt_logprobs, start=first):
        assert found.logprob == pytest.approx(float(expected[position - 1, PROMPT[position]]), abs=1e-4)
        assert list(found.top_ids) == expected[position - 1].topk(2).indices.tolist()


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(tiny: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = tiny
    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=77)
    driver = StepDriver(_runner(folder))
    alone = driver.add(PROMPT, slot=0, sampling=sampling)
    driver.run([alone], num_outputs=20)
    driver = StepDriver(_runner(folder), seed=9)
    crowd = [driver.add(PROMPT[: 5 + i], slot=i, sampling=SamplingParams(seed=i)) for i in range(5)]
    again = driver.add(PROMPT, slot=6, sampling=sampling)
    driver.run([*crowd, again], num_outputs=20, chunk=4)
    assert again.outputs == alone.outputs


def test_nan_fails_its_own_row_only_and_does_not_outlive_it(tiny: tuple[Path, PreTrainedModel]) -> None:
    """KV that is NaN must neither reach another row of the batch nor the next user of its pages."""
    folder, _ = tiny
    runner = _runner(folder)
    driver = StepDriver(runner)
    clean = driver.add(PROMPT, slot=0)
    driver.run([clean], num_outputs=8)
    runner.kv.pages.fill(np.nan)  # what a broken request could have left behind
    driver = StepDriver(runner, seed=3)
    good, bad = driver.add(PROMPT, slot=1), driver.add(PROMPT[:20], slot=2)
    driver.step([(good, 16), (bad, 19)])
    runner.kv.memory[bad.pages[0]] = 0xFF  # NaN in every dtype
    driver.step([(good, 21), (bad, 1)])
    for _ in range(7):
        result = driver.step([(good, 1), (bad, 1)])
        rows = {int(slot): bool(finite) for slot, finite in zip(result.slots, result.is_finite, strict=True)}
        assert rows == {1: True, 2: False}
    assert good.outputs == clean.outputs


def test_rows_that_do_not_sample_have_no_token(tiny: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = tiny
    driver = StepDriver(_runner(folder))
    first, second = driver.add(PROMPT, slot=0), driver.add(PROMPT, slot=1)
    result = driver.step([(first, 10), (second, len(PROMPT))])
    assert result.tokens[0] == -1
    assert result.tokens[1] >= 0
    assert result.is_finite.all()
    assert result.step_id == 0
    assert not result.logprobs
    assert not result.prompt_logprobs


@pytest.mark.parametrize(
    ("largest", "expected"), [(8192, (8192, 6144, 4096, 3072)), (1000, (1000, 768, 512)), (512, (512,)), (100, (100,))]
)
def test_chunks_of_the_warmup_begin_with_the_largest(largest: int, expected: tuple[int, ...]) -> None:
    sizes = chunk_sizes(largest)
    assert sizes[: len(expected)] == expected
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("sizes", [(128,), (100, 40, 7), (10_000,)])
def test_warmup_leaves_no_trace(tiny: tuple[Path, PreTrainedModel], sizes: tuple[int, ...]) -> None:
    """The warm-up uses slot 0 and page 0; a request that takes them afterwards must not notice."""
    folder, _ = tiny
    texts = []
    for is_warm in (False, True):
        runner = _runner(folder)
        if is_warm:
            warm_up(runner, sizes=sizes)
        driver = StepDriver(runner)
        request = driver.add(PROMPT, slot=0)
        driver.run([request], num_outputs=5)
        texts.append(request.outputs)
    assert texts[0] == texts[1]


def test_a_program_gets_the_kind_of_each_row_from_the_plan(
    tiny: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AMX a row's kind decides its arithmetic. A prompt's last token alone is no decode, its logits no sample."""
    runner, seen = _runner(tiny[0]), []
    run = Program.run

    def spy(program: Program, step: StepArrays, **ops: int) -> None:
        seen.append((step.struct.num_decodes, len(step.context_lens), step.struct.num_sampled, len(step.selected)))
        run(program, step, **ops)

    monkeypatch.setattr(Program, "run", spy)
    driver = StepDriver(runner)
    first = driver.add(PROMPT[:3], slot=0)
    driver.run([first], num_outputs=2, chunk=10)
    second = driver.add(PROMPT[:11], slot=1, logprobs=LogprobParams(prompt_start=0))
    driver.run([first, second], num_outputs=4, chunk=10)
    assert seen[:2] == [(0, 1, 1, 1), (1, 1, 1, 1)]
    assert seen[2:5] == [(1, 2, 1, 1), (1, 2, 0, 8), (1, 2, 2, 2)]


def test_a_stale_use_of_a_slot_is_refused(tiny: tuple[Path, PreTrainedModel]) -> None:
    """A plan that names an earlier use of the slot would compute with another request's state."""
    folder, _ = tiny
    driver = StepDriver(_runner(folder))
    request = driver.add(PROMPT, slot=0)
    driver.step([(request, len(PROMPT))])
    request.use += 1
    with pytest.raises(AssertionError, match="slot 0 has no use 2"):
        driver.step([(request, 1)])


def test_memory_is_what_the_layout_says(tiny: tuple[Path, PreTrainedModel]) -> None:
    folder, reference = tiny
    runner = _runner(folder, page_size=8, num_pages=10)
    loaded = load_model(resolve_model(str(folder)), device=CpuDevice(), dtype="float32")
    page_bytes = loaded.kv_layout(page_size=8).page_bytes
    assert page_bytes == 3 * 2 * 2 * 8 * 16 * 4  # layers, K and V, heads, tokens, head_dim, bytes
    num_parameters = sum(it.numel() for it in reference.parameters())
    assert runner.memory_bytes() == {"weights": num_parameters * 4, "kv_cache": 10 * page_bytes}


@pytest.mark.parametrize(("name", "value"), [("num_pages", 0), ("max_running", 0), ("page_size", 0)])
def test_sizes_of_nothing_are_refused_by_name(tiny: tuple[Path, PreTrainedModel], name: str, value: int) -> None:
    folder, _ = tiny
    with pytest.raises(ValueError, match=name):
        _runner(folder, **{name: value})


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_a_copied_part_of_a_page_gives_the_same_bits_as_computing_it(
    tiny: tuple[Path, PreTrainedModel], kv_dtype: str
) -> None:
    """Whole pages shared or not, one token copied or all but one: logits and KV are those of a whole prefill."""
    device = CpuDevice()
    loaded = load_model(resolve_model(str(tiny[0])), device=device, dtype="float32")
    layout = loaded.kv_layout(page_size=8, dtype=kv_dtype)
    runner = CpuRunner(loaded, device, layout=layout, num_pages=64, max_running=8)
    driver = StepDriver(runner)
    wanted = LogprobParams(top=3)
    other = driver.add([*PROMPT[:23], 7, *PROMPT[24:]], slot=0)
    driver.run([other], num_outputs=2)
    whole = driver.add(PROMPT, slot=1, logprobs=wanted)
    driver.run([whole], num_outputs=6)
    for slot, num_shared in enumerate((1, 5, 17, 23), start=2):
        request = driver.add(PROMPT, slot=slot, logprobs=wanted)
        driver.share(request, other, num_shared)
        driver.run([request], num_outputs=6, chunk=9)
        assert (request.outputs, request.logprobs) == (whole.outputs, whole.logprobs)
        for array in (runner.kv.pages, runner.kv.exponents):
            if array is not None:
                found, right = (_tokens_of(array, it.pages, len(PROMPT)) for it in (request, whole))
                assert np.array_equal(found, right)


def _tokens_of(array: np.ndarray, pages: list[int], num_tokens: int) -> np.ndarray:
    """The KV of the first tokens on `pages` of eight. [num_tokens, layers, 2, heads, ...]"""
    at = np.arange(num_tokens)
    return np.moveaxis(array, 4, 1)[np.array(pages)[at // 8], at % 8]
