"""The asynchronous runner. Without a GPU its kernels run under Triton's interpreter, so texts are short here;
benchmarks/gpu/check_device.py runs the long ones on a card."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs
from step_driver import GREEDY, DrivenRequest, StepDriver
from transformers import PreTrainedModel

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels import decode as triton_decode
from headwater.devices.cuda.products import linear as cuda_linear
from headwater.devices.cuda.products.coded_linear import CodedLinear
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.gpu_runner import GpuRunner
from headwater.messages.generation import LogprobParams, SamplingParams
from headwater.models import loader
from headwater.models.config import read_hf_config
from headwater.models.loader import load_model, resolve_model
from headwater.models.weights import WeightForm
from headwater.scheduling.plan import NEWEST_TOKEN, PageCopy, PageUpdate, SlotAssignment, StepPlan, TokenMasks
from tiny_gguf import write_gguf_model
from tiny_models import VOCAB_SIZE, greedy_text, make_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    # what padding tokens compute is undefined, and the interpreter tells of it
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

# padded steps with prompts: on a CPU computed kernel by kernel; larger steps run as they are
PROMPT_SIZES = ((0, 8), (0, 16), (1, 8), (4, 8), (4, 16))
MAX_DRAFTED = 8
PROMPT = np.random.default_rng(1).integers(3, VOCAB_SIZE, 21).tolist()


@pytest.fixture(autouse=True)
def _few_interpreted_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, the kernel for few tokens takes two thirds of the time: decodes of one test here have it.

    And no context here is long enough to be cut: of the programs for stretches of one nearly all find nothing to do.
    """
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(triton_decode, "split_limits", lambda *_: (2, 64))
    if "is_launched_before" not in request.node.name:
        monkeypatch.setattr(cuda_linear, "suits", lambda *_: False)
        monkeypatch.setattr(cuda_linear, "suits_gated", lambda *_: False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, make_tiny_model("qwen3", folder, num_layers=2)


def _device() -> CudaDevice:
    return CudaDevice(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _runner(
    folder: Path, *, page_size: int = 4, num_pages: int = 64, prompts: tuple[tuple[int, int], ...] = PROMPT_SIZES
) -> GpuRunner:
    device = _device()
    loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32")
    sizes = (1, 2, 4) if device.is_gpu else ()
    return GpuRunner(
        loaded,
        device,
        layout=loaded.kv_layout(page_size=page_size),
        num_pages=num_pages,
        max_running=8,
        max_context=64,
        graph_sizes=sizes,
        prompt_graph_sizes=prompts,
        max_drafted=MAX_DRAFTED,
    )


def _cpu_runner(folder: Path) -> CpuRunner:
    device = CpuDevice(num_threads=torch.get_num_threads())
    loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32")
    return CpuRunner(loaded, device, layout=loaded.kv_layout(page_size=4), num_pages=64, max_running=8, max_context=64)


@pytest.mark.parametrize("name", ["llama-biases-mha", "qwen3-tied-one-kv-head", "mixtral"])
def test_greedy_text_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """A wrong rotation, mask, page, bias or tied head changes the text of some prompt."""
    reference = make_tiny_model(name, tmp_path, num_layers=2)
    prompts = [PROMPT, PROMPT[:1], PROMPT[3:12]]
    driver = StepDriver(_runner(tmp_path))
    requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate(prompts)]
    driver.run(requests, num_outputs=4, chunk=9)
    assert [it.outputs for it in requests] == [greedy_text(reference, prompt, 4) for prompt in prompts]


def test_blocks_of_a_file_give_the_text_of_the_same_numbers_widened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token and several, an embedding and a tied head of codes, and matrices whose rows are no whole blocks."""
    model = make_tiny_model("llama", tmp_path / "plain", num_layers=1)
    parameters = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    path = tmp_path / "model.gguf"
    write_gguf_model(path, read_hf_config(tmp_path / "plain"), "llama", parameters, block_format="Q4_0")

    def texts() -> list[list[int]]:
        driver = StepDriver(_runner(path, prompts=()))  # type: ignore[arg-type]
        requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate((PROMPT[:12], PROMPT[:1]))]
        driver.run(requests[:1], num_outputs=2, chunk=100)
        driver.run(requests, num_outputs=2, chunk=100)
        return [request.outputs for request in requests]

    widened = texts()
    kept = WeightForm("float32", _device().block_formats)  # the interpreter has no products of bfloat16
    monkeypatch.setattr(loader, "_form_of", lambda *_: kept)
    assert isinstance(_runner(path).model.layers[0].o, CodedLinear)
    assert texts() == widened


def test_a_step_is_launched_before_the_one_it_needs_is_collected(tiny: tuple[Path, PreTrainedModel]) -> None:
    """The newest token must come from the device: the host does not know it yet."""
    folder, reference = tiny
    runner = _runner(folder)
    first = SlotAssignment(3, 1, GREEDY, np.array(PROMPT, dtype=np.int32), len(PROMPT), ())
    pages = PageUpdate(3, 0, np.arange(8, dtype=np.int32)[::-1].copy())
    handles = [runner.launch(_plan(0, 3, np.array(PROMPT, dtype=np.int32), (first,), (pages,)))]
    for step in range(1, 4):
        newest = np.array([NEWEST_TOKEN], dtype=np.int32)
        handles.append(runner.launch(_plan(len(PROMPT) + step - 1, 3, newest)))
    outputs = [int(handle.collect().tokens[0]) for handle in handles[-2:]]  # the loop has no more than two at once
    assert outputs == greedy_text(reference, PROMPT, 4)[-2:]


@pytest.mark.parametrize("kv_dtype", ["float32", "float8_e4m3fn"])
def test_a_part_of_a_page_is_copied_behind_a_step_in_flight(tiny: tuple[Path, PreTrainedModel], kv_dtype: str) -> None:
    """The copy is enqueued between two steps: it sees what the first writes, and the second sees the copy."""
    folder, reference = tiny
    device = _device()
    loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32")
    layout = loaded.kv_layout(page_size=4, dtype=kv_dtype)
    runner = GpuRunner(
        loaded, device, layout=layout, num_pages=64, max_running=8, max_context=64, prompt_graph_sizes=PROMPT_SIZES
    )
    runner.kv.memory.fill_(0xFF)  # NaN, in case anything is read that was not copied
    prompt, table = np.array(PROMPT[:15], dtype=np.int32), np.arange(5, dtype=np.int32)
    first = SlotAssignment(3, 1, GREEDY, prompt, len(prompt), ())
    second = SlotAssignment(5, 1, GREEDY, prompt, len(prompt), ())
    handles = [runner.launch(_plan(0, 3, prompt, (first,), (PageUpdate(3, 0, table),)))]
    for num_copied, target in ((2, 40), (1, 50)):  # of the page at position 12; the table shares the three before it
        pages = PageUpdate(5, 0, np.array([0, 1, 2, target], dtype=np.int32))
        plan = _plan(12 + num_copied, 5, prompt[12 + num_copied :], (second,), (pages,))
        copies = (PageCopy(source=3, target=target, num_tokens=num_copied),)
        handles.append(runner.launch(structs.replace(plan, page_copies=copies)))
    tokens = [int(handle.collect().tokens[0]) for handle in handles]
    if kv_dtype == "float32":
        assert tokens == greedy_text(reference, PROMPT[:15], 1) * 3
    for num_copied, target in ((2, 40), (1, 50)):
        for part in (runner.kv.pages.view(torch.uint8), runner.kv.exponents):
            if part is not None:
                assert torch.equal(part[target, :, :, :, :num_copied], part[3, :, :, :, :num_copied])


def test_new_kv_memory_is_what_all_steps_use(tiny: tuple[Path, PreTrainedModel]) -> None:
    """CUDA graphs have recorded where the old memory was."""
    folder, reference = tiny
    runner = _runner(folder)
    layout, num_pages = runner.kv.layout, runner.kv.num_pages
    for _ in range(2):
        driver = StepDriver(runner)  # type: ignore[arg-type]
        request = driver.add(PROMPT[:7], slot=2)
        driver.run([request], num_outputs=3, chunk=5)
        assert request.outputs == greedy_text(reference, PROMPT[:7], 3)
        old = runner.kv.memory
        runner.replace_kv(None)
        runner.replace_kv(_device().allocate_kv(layout, num_pages))
        old.fill_(0xFF)  # NaN, should anything still read it


def _plan(
    num_computed: int,
    slot: int,
    token_ids: np.ndarray,
    assignments: tuple[SlotAssignment, ...] = (),
    pages: tuple[PageUpdate, ...] = (),
) -> StepPlan:
    return StepPlan(
        step_id=0,
        assignments=assignments,
        page_updates=pages,
        slots=np.array([slot], dtype=np.int32),
        uses=np.array([1], dtype=np.int64),
        num_computed=np.array([num_computed], dtype=np.int32),
        num_tokens=np.array([len(token_ids)], dtype=np.int32),
        samples=np.ones(1, dtype=np.bool_),
        token_ids=token_ids,
        num_decodes=int(token_ids[0] == NEWEST_TOKEN),
        num_outputs=np.zeros(1, dtype=np.int32),
    )


def test_sampled_text_and_logprobs_are_those_of_the_cpu(tiny: tuple[Path, PreTrainedModel]) -> None:
    """Two samplers, one contract: the same seed draws the same tokens, and reports the same log-probabilities."""
    folder, _ = tiny
    kinds = [
        SamplingParams(temperature=1.0, seed=5),
        SamplingParams(temperature=0.8, top_p=0.7, seed=6),
        SamplingParams(temperature=1.3, top_k=5, min_p=0.05, seed=7),
        SamplingParams(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.3, logit_bias={9: 2.0}),
        SamplingParams(temperature=1.0, top_k=12, top_p=0.9, presence_penalty=0.5, seed=8),
    ]
    told = []
    for runner in (_cpu_runner(folder), _runner(folder)):
        driver = StepDriver(runner)  # type: ignore[arg-type]
        wanted = LogprobParams(top=3, token_ids=(4, 9), prompt_start=0)
        requests = [driver.add(PROMPT[:7], slot=i, sampling=kind, logprobs=wanted) for i, kind in enumerate(kinds)]
        requests.append(driver.add(PROMPT[:5], slot=7))
        driver.run(requests, num_outputs=3, chunk=4)
        told.append(requests)
    for on_cpu, on_device in zip(*told, strict=True):
        assert on_device.outputs == on_cpu.outputs
        for kind in ("logprobs", "prompt_logprobs"):
            found, expected = getattr(on_device, kind), getattr(on_cpu, kind)
            assert [it.token_id for it in found] == [it.token_id for it in expected]
            assert [it.top_ids for it in found] == [it.top_ids for it in expected]
            for one, other in zip(found, expected, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert one.ids_logprobs == pytest.approx(other.ids_logprobs, abs=1e-4)


@pytest.mark.parametrize("prompts", [PROMPT_SIZES, ()], ids=["padded", "as they are"])
def test_hidden_states_are_pooled_as_on_a_cpu(tiny: tuple[Path, PreTrainedModel], prompts) -> None:
    """Beside a decode and in chunks: padding between decodes and prompts would shift the rows."""
    folder, reference = tiny
    with torch.inference_mode():
        hidden = reference.model(torch.tensor([PROMPT])).last_hidden_state[0].numpy()
    expected = {"mean": hidden.sum(axis=0), "last": hidden[-1]}
    for runner in (_cpu_runner(folder), _runner(folder, prompts=prompts)):
        driver = StepDriver(runner)  # type: ignore[arg-type]
        decoding = driver.add(PROMPT[:3], slot=0)
        driver.run([decoding], num_outputs=1)
        requests = {pooling: driver.add(PROMPT, slot=3 + i, pooling=pooling) for i, pooling in enumerate(expected)}
        while any(request.is_prefilling for request in requests.values()):
            rows = [(request, min(5, len(PROMPT) - request.num_computed)) for request in requests.values()]
            driver.step([(decoding, 1), *rows])
        for pooling, right in expected.items():
            assert len(requests[pooling].pooled) == (5 if pooling == "mean" else 1)
            np.testing.assert_allclose(sum(requests[pooling].pooled), right, rtol=1e-3, atol=1e-3)


def _mask(seed: int) -> Callable[[int], np.ndarray]:
    """Every fourth token, others at each position."""

    def words(num_outputs: int) -> np.ndarray:
        bits = np.zeros(-(-VOCAB_SIZE // 32) * 32, dtype=np.bool_)
        bits[np.random.default_rng((seed, num_outputs)).choice(VOCAB_SIZE, VOCAB_SIZE // 4, replace=False)] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)

    return words


def test_rows_with_grammars_choose_what_the_cpu_chooses_and_others_are_untouched(
    tiny: tuple[Path, PreTrainedModel],
) -> None:
    """Greedy, sampled and edited rows under masks, with log-probabilities, beside rows without a grammar."""
    folder, _ = tiny
    edited = SamplingParams(temperature=0.8, seed=4, repetition_penalty=1.3, top_k=20)
    found = []
    for runner, is_masked in ((_cpu_runner(folder), True), (_runner(folder), True), (_runner(folder), False)):
        driver = StepDriver(runner, seed=3)  # type: ignore[arg-type]
        asked = LogprobParams(top=2)
        masked = [
            driver.add(PROMPT[:9], slot=0, logprobs=asked),
            driver.add(PROMPT[:7], slot=1, sampling=SamplingParams(temperature=0.9, seed=2, top_p=0.9)),
            driver.add(PROMPT[:8], slot=2, sampling=edited, logprobs=asked),
        ]
        free = [
            driver.add(PROMPT[:6], slot=3),
            driver.add(PROMPT[:5], slot=4, sampling=SamplingParams(temperature=0.7, seed=9), logprobs=asked),
            driver.add(PROMPT[:4], slot=5, sampling=SamplingParams(temperature=0.0, repetition_penalty=1.4)),
        ]
        for number, request in enumerate(masked):
            request.mask = _mask(number) if is_masked else None
        driver.run([*masked, *free], num_outputs=4, chunk=6)
        for number, request in enumerate(masked if is_masked else ()):
            for position, token in enumerate(request.outputs):
                assert _mask(number)(position)[token // 32] >> (token % 32) & 1, "a token that the mask forbids"
        found.append(([r.outputs for r in masked], [r.outputs for r in free], [r.logprobs for r in (*masked, *free)]))
    on_cpu, on_gpu, without = found
    assert on_gpu[:2] == on_cpu[:2]
    assert on_gpu[1] == without[1], "rows without a grammar lose nothing"
    for expected, reported in zip(on_cpu[2], on_gpu[2], strict=True):
        assert [it.token_id for it in expected] == [it.token_id for it in reported]
        assert [it.logprob for it in reported] == pytest.approx([it.logprob for it in expected], abs=1e-3)


def test_a_step_with_grammars_is_launched_before_the_one_before_it_is_collected(
    tiny: tuple[Path, PreTrainedModel],
) -> None:
    """The loop's order: launch N + 1, collect N, choose N + 1. The next forward pass reads the token just chosen."""
    folder, _ = tiny
    plain = StepDriver(_cpu_runner(folder))
    expected = plain.add(PROMPT, slot=3)
    expected.mask = _mask(5)
    plain.run([expected], num_outputs=4)
    runner = _runner(folder)
    first = SlotAssignment(3, 1, GREEDY, np.array(PROMPT, dtype=np.int32), len(PROMPT), ())
    pages = PageUpdate(3, 0, np.arange(8, dtype=np.int32)[::-1].copy())
    plans = [_plan(0, 3, np.array(PROMPT, dtype=np.int32), (first,), (pages,))]
    plans += [_plan(len(PROMPT) + step, 3, np.array([NEWEST_TOKEN], dtype=np.int32)) for step in range(3)]
    outputs, pending = [], None
    for step, plan in enumerate(plans):
        handle = runner.launch(structs.replace(plan, grammar_rows=np.zeros(1, dtype=np.int32)))
        if pending is not None:
            outputs.append(int(pending.collect().tokens[0]))
        handle.choose(TokenMasks(rows=np.zeros(1, dtype=np.int32), words=_mask(5)(step)[None]))
        pending = handle
    assert pending is not None
    assert [*outputs, int(pending.collect().tokens[0])] == expected.outputs


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter computes with the NaN
def test_a_page_of_nan_fails_its_own_row_only(tiny: tuple[Path, PreTrainedModel]) -> None:
    folder, reference = tiny
    runner = _runner(folder)
    runner.kv.pages.fill_(float("nan"))
    driver = StepDriver(runner)  # type: ignore[arg-type]
    good, bad = driver.add(PROMPT, slot=1), driver.add(PROMPT[:9], slot=2)
    driver.step([(good, 21), (bad, 8)])
    runner.kv.memory[bad.pages[0]] = 0xFF  # NaN in every dtype
    for num_tokens in (1, 1, 1):
        result = driver.step([(good, 1), (bad, num_tokens)])
        rows = {int(slot): bool(finite) for slot, finite in zip(result.slots, result.is_finite, strict=True)}
        assert rows == {1: True, 2: False}
    assert good.outputs == greedy_text(reference, PROMPT, 4)


def test_after_a_launch_that_raised_the_next_steps_are_right(
    tiny: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others' page tables and newest tokens stay as they were, and what was enqueued has ended."""
    folder, reference = tiny
    runner = _runner(folder)
    driver = StepDriver(runner)
    staying = driver.add(PROMPT[:5], slot=0)
    driver.run([staying], num_outputs=2, chunk=9)
    failing = driver.add(PROMPT, slot=1)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_greedy_logits", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            driver.step([(failing, len(PROMPT))])
    runner.recover()
    other = driver.add(PROMPT[3:12], slot=1)
    driver.run([staying, other], num_outputs=4, chunk=9)
    assert staying.outputs == greedy_text(reference, PROMPT[:5], 4)
    assert other.outputs == greedy_text(reference, PROMPT[3:12], 4)


DRAFTED_PROMPTS = (PROMPT[:11], PROMPT[11:15], PROMPT[5:12])
DRAFTED_SAMPLING = (  # of each of the prompts
    SamplingParams(temperature=1.0, seed=5),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=6, logit_bias={9: 2.0}),
    SamplingParams(temperature=0.0, min_new_tokens=4),
)


def _run_drafted(driver: StepDriver, requests: list[DrivenRequest], texts: list[list[int]], num_outputs: int) -> None:
    """To `num_outputs` tokens each. Drafts are what `texts` say, wrong from a place drawn for each."""
    chance = random.Random(2)
    while unfinished := [it for it in requests if len(it.outputs) < num_outputs]:
        rows = [(it, driver.next_tokens(it, 6)) for it in unfinished]
        drafts = {}
        for request in unfinished:
            rest = texts[requests.index(request)][len(request.outputs) : num_outputs - 1]
            length = chance.randrange(min(4, len(rest) + 1))
            if not request.is_prefilling and length and sum(map(len, drafts.values())) + length <= MAX_DRAFTED:
                wrong_from = chance.randrange(6)
                wrong = [(token + 1) % VOCAB_SIZE for token in rest]
                drafts[request.slot] = [*rest[:wrong_from], *wrong[wrong_from:]][:length]
        driver.step(rows, drafts)


@pytest.mark.parametrize("prompts", [(), ((0, 4), (0, 8), (2, 8), (4, 16))], ids=["as they are", "padded"])
def test_greedy_text_is_that_of_transformers_however_good_the_drafts_are(
    tiny: tuple[Path, PreTrainedModel], prompts: tuple[tuple[int, int], ...]
) -> None:
    """Drafts beside decodes and prompts; the step after a wrong one computes from the token that counted."""
    folder, reference = tiny
    texts = [greedy_text(reference, prompt, 7) for prompt in DRAFTED_PROMPTS]
    driver = StepDriver(_runner(folder, prompts=prompts))  # type: ignore[arg-type]
    requests = [driver.add(prompt, slot=slot) for slot, prompt in enumerate(DRAFTED_PROMPTS)]
    _run_drafted(driver, requests, texts, 7)
    assert [it.outputs for it in requests] == texts
    assert sum(it.num_accepted for it in requests) > 3


def test_sampled_text_and_logprobs_are_those_of_a_cpu_without_drafts(tiny: tuple[Path, PreTrainedModel]) -> None:
    """Each row of a draft draws with the noise of its own position, and reports its own probabilities."""
    folder, _ = tiny
    told: list[list[DrivenRequest]] = []
    for runner in (_cpu_runner(folder), _runner(folder)):
        driver = StepDriver(runner)  # type: ignore[arg-type]
        requests = [
            driver.add(prompt, slot=slot, sampling=sampling, logprobs=LogprobParams(top=2), stop_token_ids=(7,))
            for slot, (prompt, sampling) in enumerate(zip(DRAFTED_PROMPTS, DRAFTED_SAMPLING, strict=True))
        ]
        if told:
            _run_drafted(driver, requests, [it.outputs for it in told[0]], 6)
        else:
            driver.run(requests, num_outputs=6)
        told.append(requests)
    for on_cpu, on_device in zip(*told, strict=True):
        assert on_device.outputs == on_cpu.outputs
        assert [it.top_ids for it in on_device.logprobs] == [it.top_ids for it in on_cpu.logprobs]
        assert [it.logprob for it in on_device.logprobs] == pytest.approx(
            [it.logprob for it in on_cpu.logprobs], abs=1e-3
        )
    assert sum(it.num_accepted for it in told[1]) > 2
