"""The whole engine with real kernels on tiny models: text is transformers', whatever the cache does meanwhile.

Where there is a GPU, it computes: launches ahead, CUDA graphs and copies on streams of their own included.
"""

import random
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

from transformers import PreTrainedModel  # noqa: E402

from engine_driver import CLIENT, MemoryWire  # noqa: E402
from headwater.cache.host_tier import HostTier, WritePolicy  # noqa: E402
from headwater.cache.invariants import check_invariants  # noqa: E402
from headwater.clock import ManualClock  # noqa: E402
from headwater.devices.cpu.device import CpuDevice  # noqa: E402
from headwater.engine.wiring import wire_engine  # noqa: E402
from headwater.execution.cpu_runner import CpuRunner, RecordedModel  # noqa: E402
from headwater.execution.runner import KvLifetime, Runner  # noqa: E402
from headwater.execution.weight_store import Checkpoint, WeightStore  # noqa: E402
from headwater.launch.cpu_placement import CpuPlacement  # noqa: E402
from headwater.launch.placement import Placement  # noqa: E402
from headwater.launch.served_model import ServedModel  # noqa: E402
from headwater.messages.base import pack_ids  # noqa: E402
from headwater.messages.control import FlushCache  # noqa: E402
from headwater.messages.generation import (  # noqa: E402
    Finish,
    Generate,
    Grammar,
    Outputs,
    RequestOptions,
    SamplingParams,
    TokenLogprob,
)
from headwater.messages.state import EngineReady  # noqa: E402
from headwater.messages.weights import ReleaseMemory, ResumeMemory, UpdateWeights  # noqa: E402
from headwater.messages.wire import ToClient  # noqa: E402
from headwater.models.loader import LoadedModel, load_model, resolve_model  # noqa: E402
from headwater.scheduling.limits import SchedulerLimits  # noqa: E402
from headwater.scheduling.speculation.drafters import NO_SPECULATION, SpeculationSettings  # noqa: E402
from headwater.simulation.fakes.grammar import FakeCompiler  # noqa: E402
from tiny_models import VOCAB_SIZE, greedy_text, is_greedy_text, make_tiny_model  # noqa: E402

PATIENCE_S = 120.0
PAGE_SIZE = 4
NUM_OUTPUTS = 20


def _placement() -> Placement:
    if not torch.cuda.is_available():
        return CpuPlacement(CpuDevice())
    from headwater.devices.cuda.device import CudaDevice
    from headwater.launch.cuda_placement import CudaPlacement

    return CudaPlacement(CudaDevice())


def _runner(loaded: LoadedModel, placement: Placement, *, num_pages: int, max_running: int) -> Runner:
    layout = loaded.kv_layout(page_size=PAGE_SIZE)
    sizes = {"layout": layout, "num_pages": num_pages, "max_running": max_running, "max_context": 200}
    if isinstance(placement, CpuPlacement):
        return CpuRunner(loaded, placement.device, **sizes)
    from headwater.execution.gpu_runner import GpuRunner
    from headwater.execution.step_graphs import graph_sizes

    prompts = ((0, 16), (0, 64), (min(4, max_running), 32))
    graphs = {"graph_sizes": graph_sizes(max_running), "prompt_graph_sizes": prompts, "max_drafted": 32}
    return GpuRunner(loaded, placement.device, **sizes, **graphs, arrivals=placement.arrivals)


def _slow_restores(placement: Placement, copier) -> list[int]:
    """On a GPU: restores arrive a layer at a time, some milliseconds each; counts the steps that wait for some."""
    from headwater.devices.cuda import arrivals as cuda_arrival

    cuda_arrival._MIN_GROUP_BYTES = copier._min_piece_bytes = 1
    move, awaited, waits = copier._move, placement.arrivals.awaited, [0]

    def slowly(source, sources, target, targets) -> None:
        if target.is_cuda:
            torch.cuda._sleep(10_000_000)
        move(source, sources, target, targets)

    def counted():
        waits[0] += bool(found := awaited())
        return found

    copier._move, placement.arrivals.awaited = slowly, counted
    return waits


class RealEngine:
    """Loop, scheduler, cache and a real runner in float32, a turn at a time."""

    def __init__(
        self,
        folder: Path,
        *,
        num_pages: int,
        num_host_pages: int = 0,
        max_running: int = 8,
        speculation: SpeculationSettings = NO_SPECULATION,
    ) -> None:
        placement = _placement()
        device = placement.device
        loaded = load_model(resolve_model(str(folder)), device=device, dtype="float32")
        self.runner = runner = _runner(loaded, placement, num_pages=num_pages, max_running=max_running)
        self.clock = ManualClock()
        self.wire = MemoryWire(self.clock)
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprob]] = {}
        self.metas: dict[str, object] = {}
        self.embeddings: dict[str, bytes | None] = {}
        self.finished: set[str] = set()
        self.ends: dict[str, Finish] = {}
        self.replies: dict[str, ToClient] = {}
        self.num_turns = 0
        host = None
        if num_host_pages:
            memory, copier = placement.make_host_memory(runner, num_pages=num_host_pages)
            self.num_early_reads = _slow_restores(placement, copier) if torch.cuda.is_available() else [0]
            host = HostTier(
                num_pages=num_host_pages,
                copier=copier,
                pages=memory,
                policy=WritePolicy.WRITE_THROUGH,
                min_restore_tokens=PAGE_SIZE,
            )
        checkpoint = Checkpoint(str(folder), "auto")
        self.parts = wire_engine(
            wire=self.wire,
            runner=ServedModel(
                runner,
                weights=WeightStore(runner, loaded, device=device, checkpoint=checkpoint, seed=0),
                kv_memory=KvLifetime(runner, device),
            ),
            ready=EngineReady(
                call_id="",
                model_name="tiny",
                architecture=loaded.config.architecture,
                dtype="float32",
                vocab_size=loaded.config.vocab_size,
                max_context=200,
                eos_token_ids=(),
                page_size=PAGE_SIZE,
                num_pages=num_pages,
                page_bytes=runner.kv.layout.page_bytes,
                max_running=max_running,
                weights_id=loaded.weights_id,
                weight_version="default",
                load_s=0.0,
                device="cpu",
            ),
            limits=SchedulerLimits(
                max_running=max_running, max_step_tokens=40, prefill_chunk_tokens=23, max_queued=100, max_context=200
            ),
            clock=self.clock,
            host=host,
            min_part_tokens=1,
            grammar_compiler=FakeCompiler(vocab_size=loaded.config.vocab_size, end_ids=frozenset()),
            speculation=speculation,
        )

    def send(self, message) -> None:
        self.wire.inbound.append((CLIENT, message))

    def generate(self, rid: str, prompt: list[int], *, priority: int = 0, grammar: Grammar | None = None) -> None:
        self.tokens[rid] = []
        sampling = SamplingParams(max_new_tokens=NUM_OUTPUTS, temperature=0.0)
        options = RequestOptions(priority=priority)
        ids = pack_ids(prompt)
        self.send(Generate(rid=rid, prompt_ids=ids, sampling=sampling, options=options, grammar=grammar))

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.parts.loop.turn()
            for _, message in self.wire.sent:
                if isinstance(message, Outputs):
                    for output in message.items:
                        self.tokens[output.rid] += output.token_ids
                        self.logprobs.setdefault(output.rid, []).extend(output.logprobs or ())
                        self.metas[output.rid] = output.meta or self.metas.get(output.rid)
                        self.embeddings[output.rid] = output.embedding
                        if output.finish is not None:
                            self.finished.add(output.rid)
                            self.ends[output.rid] = output.finish
                else:
                    self.replies[message.call_id] = message
            self.wire.sent = []
            self.num_turns += 1
            if self.num_turns % 5 == 0:
                check_invariants(self.parts.cache)

    def finish(self) -> None:
        """Turn until all requests have ended. A GPU's copies take their own time, however quick idle turns are."""
        last_s = time.monotonic() + PATIENCE_S
        while self.finished != set(self.tokens):
            assert time.monotonic() < last_s, "requests did not finish"
            self.turn()

    def wait_for(self, call_id: str) -> ToClient:
        last_s = time.monotonic() + PATIENCE_S
        while call_id not in self.replies:
            assert time.monotonic() < last_s, f"no answer to {call_id}"
            self.turn()
            time.sleep(0.002)  # weights are staged in a thread
        return self.replies[call_id]


def _prompts(count: int, vocab_size: int) -> list[list[int]]:
    source = random.Random(5)
    stems = [[source.randrange(3, vocab_size) for _ in range(60)] for _ in range(3)]
    prompts = []
    for _ in range(count):
        stem = source.choice(stems)[: source.randrange(10, 61)]
        prompts.append(stem + [source.randrange(3, vocab_size) for _ in range(source.randrange(1, 12))])
    return prompts


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "qwen3-moe"])
def model(request, tmp_path_factory) -> tuple[Path, PreTrainedModel]:
    """A model's folder, and transformers' reading of it."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, make_tiny_model(request.param, folder)


@pytest.mark.parametrize("num_host_pages", [0, 400], ids=["device", "host"])
def test_text_is_transformers_under_sharing_retraction_restores_and_flushes(model, num_host_pages):
    """Prompts in any order over a pool of a third of what they need, flushes in between."""
    (folder, reference), prompts = model, _prompts(16, VOCAB_SIZE)
    engine = RealEngine(folder, num_pages=50, num_host_pages=num_host_pages)
    source = random.Random(1)
    for lap in range(2):
        for index in source.sample(range(len(prompts)), len(prompts)):
            engine.generate(f"{lap}-{index}", prompts[index], priority=source.choice([0, 0, 1]))
            engine.turn(source.randrange(3))
            if source.random() < 0.1:
                engine.send(FlushCache(call_id=f"f{lap}-{index}", mode="now"))
        engine.finish()
    for index, prompt in enumerate(prompts):
        first, second = engine.tokens[f"0-{index}"], engine.tokens[f"1-{index}"]
        assert first == second and len(first) == NUM_OUTPUTS
        assert is_greedy_text(reference, prompt, first), f"prompt {index}"
    counters = engine.parts.scheduler.counters
    assert counters.num_retractions > 0 and counters.cached_tokens_device > 0 and counters.copied_tokens > 0
    if num_host_pages:
        assert counters.cached_tokens_host > 0 and counters.num_parked > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_text_is_transformers_while_pages_still_arrive(name, tmp_path):
    """Steps read restored pages layer by layer, in graphs and kernel by kernel, alone and beside decodes."""
    reference = make_tiny_model(name, tmp_path)
    engine = RealEngine(tmp_path, num_pages=400, num_host_pages=400)
    # the clock stands still, so no cost is ever seen
    engine.parts.cache.lower.restore_cost.is_worth = lambda num_tokens: True
    prompts = _prompts(8, VOCAB_SIZE)
    expected = [greedy_text(reference, prompt, NUM_OUTPUTS) for prompt in prompts]
    for lap in range(4):
        for index, prompt in enumerate(prompts):
            engine.generate(f"{lap}-{index}", prompt)
            engine.turn(3)
        engine.finish()
        assert [engine.tokens[f"{lap}-{index}"] for index in range(len(prompts))] == expected
        last_s = time.monotonic() + PATIENCE_S
        while engine.parts.blockers():  # threads copy
            assert time.monotonic() < last_s, engine.parts.blockers()
            engine.turn()
            time.sleep(0.001)
        engine.send(FlushCache(call_id=f"flush-{lap}", mode="now", tiers=("device",)))
        engine.turn(2)
    assert engine.parts.scheduler.counters.cached_tokens_host > 0
    assert engine.num_early_reads[0] > 0
    check_invariants(engine.parts.cache)


def test_new_weights_give_their_own_text_and_find_nothing_old(tmp_path):

    old, new = tmp_path / "old", tmp_path / "new"
    old_model = make_tiny_model("llama", old)
    make_tiny_model("llama-linear-rope", new)
    prompt = _prompts(1, VOCAB_SIZE)[0]
    engine = RealEngine(old, num_pages=100)
    engine.generate("before", prompt)
    engine.finish()
    assert engine.tokens["before"] == greedy_text(old_model, prompt, NUM_OUTPUTS)

    with torch.no_grad():
        for parameter in old_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    old_model.save_pretrained(tmp_path / "updated")
    engine.send(UpdateWeights(call_id="u", path=str(tmp_path / "updated"), weight_version="2"))
    assert engine.wait_for("u").weight_version == "2"
    engine.generate("after", prompt)
    engine.finish()
    assert engine.metas["after"].cached_device == 0
    assert engine.tokens["after"] == greedy_text(old_model, prompt, NUM_OUTPUTS) != engine.tokens["before"]

    broken = tmp_path / "broken"
    old_model.save_pretrained(broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    engine.send(UpdateWeights(call_id="b", path=str(broken)))
    assert engine.wait_for("b").status == 400
    engine.send(UpdateWeights(call_id="m", path=str(new), load_format="gguf"))
    assert engine.wait_for("m").status == 400
    engine.generate("still", prompt)
    engine.finish()
    assert engine.tokens["still"] == engine.tokens["after"] and engine.metas["still"].cached_device > 0


def test_new_weights_bring_the_ends_that_their_own_files_name(tmp_path):
    """A policy trained to end otherwise would run on to its limit; the old ends come back with the old files."""

    model = make_tiny_model("llama", tmp_path / "old")
    prompt = _prompts(1, VOCAB_SIZE)[0]
    text = greedy_text(model, prompt, NUM_OUTPUTS)
    end = next(token for token in text[3:] if token not in text[:3] and token != 2)
    model.generation_config.eos_token_id = [2, end]
    model.save_pretrained(tmp_path / "new")
    engine = RealEngine(tmp_path / "old", num_pages=100)
    for call_id, folder, expected in (("a", "new", text[: text.index(end) + 1]), ("b", "old", text)):
        engine.generate(f"waiting-{call_id}", prompt)
        engine.send(UpdateWeights(call_id=call_id, path=str(tmp_path / folder)))
        engine.wait_for(call_id)
        engine.generate(f"after-{call_id}", prompt)
        engine.finish()
        assert engine.tokens[f"after-{call_id}"] == expected


def test_released_memory_comes_back_with_the_same_text(tmp_path):

    reference = make_tiny_model("qwen3", tmp_path)
    prompt = _prompts(1, VOCAB_SIZE)[0]
    engine = RealEngine(tmp_path, num_pages=100)
    engine.generate("a", prompt)
    engine.finish()
    engine.send(ReleaseMemory(call_id="r"))
    assert engine.wait_for("r").num_bytes > 0
    engine.generate("b", prompt)
    engine.turn(5)
    assert engine.tokens["b"] == []
    engine.send(ResumeMemory(call_id="m"))
    assert engine.wait_for("m").released == ()
    engine.finish()
    assert engine.tokens["b"] == engine.tokens["a"] == greedy_text(reference, prompt, NUM_OUTPUTS)
    assert engine.metas["b"].cached_device == 0


def test_a_prompt_of_the_whole_context_without_a_new_token(tmp_path):
    """It once found the page table too short, and the engine ended."""
    reference = make_tiny_model("llama", tmp_path)
    engine = RealEngine(tmp_path, num_pages=120)
    prompt = [3 + (7 * place) % (VOCAB_SIZE - 3) for place in range(200)]
    for rid, length, num_tokens in (("whole", 200, 0), ("last", 199, 1), ("again", 200, 0)):
        engine.tokens[rid] = []
        sampling = SamplingParams(max_new_tokens=num_tokens, temperature=0.0)
        engine.send(Generate(rid=rid, prompt_ids=pack_ids(prompt[:length]), sampling=sampling))
    engine.finish()
    assert engine.tokens["whole"] == engine.tokens["again"] == []
    assert engine.tokens["last"] == greedy_text(reference, prompt[:199], 1)


def test_the_end_of_free_text_is_forced_and_all_else_is_the_models(tmp_path):
    """As a budget of thinking does it; the row beside it is not touched."""
    reference = make_tiny_model("llama", tmp_path)
    prompt = _prompts(1, VOCAB_SIZE)[0]
    free = greedy_text(reference, prompt, NUM_OUTPUTS)
    end = next(token for token in range(VOCAB_SIZE) if token not in free)
    engine = RealEngine(tmp_path, num_pages=100)
    engine.generate("free", prompt)
    engine.generate("limited", prompt, grammar=Grammar("", begins_after=(end,), begins_within=3))
    engine.finish()
    forced = [*free[:3], end]
    assert engine.tokens["free"] == free
    assert engine.tokens["limited"] == forced + greedy_text(reference, prompt + forced, NUM_OUTPUTS - len(forced))


def test_after_a_step_that_raises_other_requests_have_the_right_text(tmp_path, monkeypatch):
    """The runner's slots, page tables and newest tokens of the others are as they were."""
    reference = make_tiny_model("llama", tmp_path)
    prompts = _prompts(6, VOCAB_SIZE)
    engine = RealEngine(tmp_path, num_pages=120, max_running=3)
    for number, prompt in enumerate(prompts):
        engine.generate(f"r{number}", prompt)
    engine.turn(12)
    # a GPU's runner calls the model in every step, a CPU's has recorded it
    owner, name = (engine.runner.model, "forward") if torch.cuda.is_available() else (RecordedModel, "run")
    compute, num_left = getattr(owner, name), [1]

    def failing(*args, **kwargs):
        if num_left[0]:
            num_left[0] -= 1
            raise RuntimeError("out of memory, perhaps")
        return compute(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    engine.runner.replace_model(engine.runner.model)  # on a GPU: no graph computes in its place
    engine.finish()
    texts = {f"r{number}": greedy_text(reference, prompt, NUM_OUTPUTS) for number, prompt in enumerate(prompts)}
    failed = {rid: finish.message for rid, finish in engine.ends.items() if finish.status == 500}
    assert 1 <= len(failed) <= 3, failed
    for rid, text in texts.items():
        assert engine.tokens[rid] == (text[: len(engine.tokens[rid])] if rid in failed else text)
    check_invariants(engine.parts.cache)
    assert not engine.parts.cache.leases and engine.parts.blockers() == {}
