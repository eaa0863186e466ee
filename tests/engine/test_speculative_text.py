"""The whole engine with a real model: with speculation, text, log-probabilities and ends are those without it, on a CPU
bit for bit, however good the drafts are and whatever the cache does meanwhile.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

import test_golden_engine  # noqa: E402
from test_golden_engine import RealEngine, _prompts  # noqa: E402

from headwater.devices.cuda.device import CudaDevice  # noqa: E402
from headwater.devices.cuda.kernels import decode as triton_decode  # noqa: E402
from headwater.devices.cuda.products import linear as cuda_linear  # noqa: E402
from headwater.execution.pending_step import PendingStep  # noqa: E402
from headwater.launch.cuda_placement import CudaPlacement  # noqa: E402
from headwater.messages.base import pack_ids  # noqa: E402
from headwater.messages.control import FlushCache  # noqa: E402
from headwater.messages.generation import Generate, LogprobParams, RequestOptions, SamplingParams  # noqa: E402
from headwater.scheduling.speculation.drafters import GPU_LIMITS, NO_SPECULATION, SpeculationSettings  # noqa: E402
from headwater.scheduling.speculation.drafting import Source  # noqa: E402
from headwater.scheduling.speculation.step_times import StepTimes  # noqa: E402
from tiny_models import VOCAB_SIZE, make_tiny_model  # noqa: E402

on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU bits depend on the rows of a step")
NUM_OUTPUTS = 30
SAMPLING = (  # each prompt gets one of these
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 12},
    {"temperature": 1.2, "min_p": 0.02, "seed": 13, "logit_bias": {5: 4.0, 9: -3.0}},
    {"temperature": 0.0, "min_new_tokens": 9, "stop_token_ids": tuple(range(40, 80))},
    {"temperature": 1.0, "seed": 14, "stop_token_ids": tuple(range(40, 52))},
    {"temperature": 0.7, "seed": 15, "frequency_penalty": 0.5, "presence_penalty": 0.3},  # never drafted
    {"temperature": 0.0, "repetition_penalty": 1.2},  # never drafted
)


@dataclass
class KnownText:
    """Drafts what a run without speculation wrote, with a wrong token now and then."""

    texts: dict[str, list[int]]
    chance: random.Random

    def draft(self, request, drafting, most):
        tokens = self.texts[request.rid][request.num_outputs :][: self.chance.randrange(most + 1)]
        if tokens and self.chance.random() < 0.6:
            at = self.chance.randrange(len(tokens))
            tokens = [*tokens[:at], (tokens[at] + 1) % VOCAB_SIZE, *tokens[at + 1 :]]
        return np.array(tokens, dtype=np.int32), self.chance.choice(list(Source)[1:]) if tokens else Source.NONE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speculative")
    make_tiny_model("qwen3", folder)
    return folder


def request(rid: str, prompt: list[int], *, salt: str = "", **sampling) -> Generate:
    return Generate(
        rid=rid,
        prompt_ids=pack_ids(prompt),
        sampling=SamplingParams(max_new_tokens=NUM_OUTPUTS, **sampling),
        logprobs=LogprobParams(top=3) if rid.endswith("0") else None,
        options=RequestOptions(cache_salt=salt),
    )


def play(engine: RealEngine, requests: list[Generate], *, flushes: int = 0) -> RealEngine:
    """All requests, a few turns apart."""
    source = random.Random(4)
    for number, message in enumerate(requests):
        engine.tokens[message.rid] = []
        engine.send(message)
        engine.turn(source.randrange(4))
        if flushes and number % flushes == flushes - 1:
            engine.send(FlushCache(call_id=f"f{number}", mode="now"))
    engine.finish()
    return engine


def mixed() -> list[Generate]:
    prompts = _prompts(16, VOCAB_SIZE)
    return [request(f"{n}", prompt, **SAMPLING[n % len(SAMPLING)]) for n, prompt in enumerate(prompts * 2)]


def told(engine: RealEngine) -> dict[str, tuple]:
    return {rid: (engine.tokens[rid], engine.logprobs[rid], engine.ends[rid]) for rid in engine.tokens}


@on_a_cpu
@pytest.mark.parametrize(
    ("num_pages", "num_host_pages", "flushes"),
    [(400, 0, 0), (50, 400, 7)],
    ids=["roomy", "parked"],
)
def test_drafts_change_no_bit_of_any_answer(folder, num_pages, num_host_pages, flushes):
    """Right and wrong drafts, stop tokens and limits inside them, prefix hits, retractions, parking, flushes."""
    sizes = {"num_pages": num_pages, "num_host_pages": num_host_pages}
    plain = play(RealEngine(folder, **sizes), mixed(), flushes=flushes)
    drafter = KnownText(dict(plain.tokens), random.Random(num_pages))
    engine = RealEngine(folder, **sizes, speculation=SpeculationSettings(drafter=drafter))
    play(engine, mixed(), flushes=flushes)
    assert told(engine) == told(plain)
    counters = engine.parts.scheduler.counters
    assert 100 < counters.spec_accepted_tokens < counters.spec_draft_tokens - 50
    assert bool(counters.num_retractions) == (num_pages == 50)
    with_penalties = [it.rid for it in mixed() if it.sampling.frequency_penalty or it.sampling.repetition_penalty != 1]
    assert with_penalties and not any(engine.metas[rid].num_draft_steps for rid in with_penalties)
    drafted = [meta for rid, meta in engine.metas.items() if rid not in with_penalties]
    assert sum(meta.num_accepted for meta in drafted) == counters.spec_accepted_tokens


def repeating() -> list[Generate]:
    """Texts of few different tokens, which repeat themselves."""
    prompts = _prompts(6, VOCAB_SIZE)
    few = dict.fromkeys((20, 21, 22), 30.0)
    return [
        request(f"{n}", prompt, logit_bias=few, temperature=0.0 if n % 2 else 1.0, seed=n)
        for n, prompt in enumerate(prompts)
    ]


@on_a_cpu
def test_text_that_repeats_itself_takes_fewer_steps(folder):
    plain, engine = (
        play(RealEngine(folder, num_pages=400, max_running=1, speculation=speculation), repeating())
        for speculation in (NO_SPECULATION, SpeculationSettings("ngram"))
    )
    assert told(engine) == told(plain)
    assert engine.parts.scheduler.counters.spec_accepted_tokens > 20
    assert engine.parts.scheduler._num_launched < plain.parts.scheduler._num_launched - 20


@on_a_cpu
def test_what_an_answer_said_is_drafted_for_the_next_one_of_its_namespace(folder):
    """The same question again costs few steps; under another salt, as many as the first time."""
    prompt = _prompts(1, VOCAB_SIZE)[0]
    plain = play(RealEngine(folder, num_pages=400), [request("a", prompt, temperature=1.0, seed=3)])
    engine = RealEngine(folder, num_pages=400, speculation=SpeculationSettings("tree"))
    num_steps = []
    for rid, salt in (("a", ""), ("b", ""), ("other", "tenant")):
        before = engine.parts.scheduler._num_launched
        play(engine, [request(rid, prompt, salt=salt, temperature=1.0, seed=3)])
        num_steps.append(engine.parts.scheduler._num_launched - before)
        assert engine.tokens[rid] == plain.tokens["a"]
    first, again, elsewhere = num_steps
    assert again <= first // 2 and elsewhere == first


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_gpu_that_is_a_step_ahead_writes_the_same_text(tmp_path, monkeypatch):
    """Steps without drafts are launched before the one before is collected; a draft waits for its tokens.

    Without a GPU the kernels run under Triton's interpreter.
    """
    make_tiny_model("qwen3", tmp_path, num_layers=1)
    if not torch.cuda.is_available():
        monkeypatch.setattr(test_golden_engine, "_placement", lambda: CudaPlacement(CudaDevice(torch.device("cpu"))))
        monkeypatch.setattr(triton_decode, "split_limits", lambda *_: (2, 64))
        monkeypatch.setattr(cuda_linear, "suits", lambda *_: False)
        monkeypatch.setattr(cuda_linear, "suits_gated", lambda *_: False)
    monkeypatch.setattr(PendingStep, "is_done", lambda self: False)  # in the turn of its launch
    monkeypatch.setattr(StepTimes, "needs_plain", lambda *_: False)  # texts are short
    asked = [
        request(f"{number}", prompt[:length], **sampling)
        for number, (prompt, length, sampling) in enumerate(
            zip(_prompts(3, VOCAB_SIZE), (5, 9, 3), (SAMPLING[0], SAMPLING[1], SAMPLING[7]), strict=True)
        )
    ]
    asked = [structs.replace(it, sampling=structs.replace(it.sampling, max_new_tokens=9)) for it in asked]
    plain = play(RealEngine(tmp_path, num_pages=60, max_running=3), asked)
    drafter = KnownText(dict(plain.tokens), random.Random(2))
    settings = SpeculationSettings(drafter=drafter, num_draft_tokens=3, limits=GPU_LIMITS)
    engine = RealEngine(tmp_path, num_pages=60, max_running=3, speculation=settings)
    launched_ahead = []
    launch = engine.parts.loop._steps.launch

    def watched(plan):
        is_ahead = engine.parts.loop._steps.uncollected is not None
        launched_ahead.append(is_ahead)
        assert not (is_ahead and plan.has_drafts), "a draft follows a token that is not known"
        return launch(plan)

    monkeypatch.setattr(engine.parts.loop._steps, "launch", watched)
    play(engine, asked)
    assert engine.tokens == plain.tokens
    assert {rid: it.type for rid, it in engine.ends.items()} == {rid: it.type for rid, it in plain.ends.items()}
    counters = engine.parts.scheduler.counters
    assert 3 < counters.spec_accepted_tokens < counters.spec_draft_tokens
    assert any(launched_ahead) and not all(launched_ahead)
