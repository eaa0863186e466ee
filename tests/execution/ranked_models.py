"""Tiny models whose ranks are threads of the test: each has its own copy of the kernels, or computes in numpy."""

import hashlib
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from headwater.devices.cpu.device import CpuDevice
from headwater.devices.cpu.kernel_library import KernelLibrary, kernel_library
from headwater.devices.cpu.ranks.group import CpuRanks
from headwater.devices.cpu.ranks.segment import RankSegment, rank_buffer_bytes
from headwater.devices.device import Device
from headwater.devices.host_tensor import HostTensor
from headwater.devices.kv_memory import KVMemory
from headwater.execution.cpu_runner import ComputedStep, CpuRunner
from headwater.models.config import ModelConfig
from headwater.models.loader import LoadedModel, share_of
from headwater.models.ranks.share import ModelShare
from headwater.models.reading.build_decoder import build_decoder
from headwater.models.rope import RopeConfig
from headwater.models.weights import PlacedWeights, WeightForm, WeightSource
from headwater.scheduling.plan import StepPlan

VOCAB_SIZE = 211
_SLOTS = 16
_WAIT_S = 60.0


def tiny_config(**changes: object) -> ModelConfig:
    """4 query heads, 2 KV heads, every optional parameter."""
    sizes: dict[str, object] = {
        "architecture": "LlamaForCausalLM", "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 112,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": RopeConfig(theta=500.0),
        "norm_eps": 1e-5, "tie_word_embeddings": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True,
        "qk_norm": True, "max_context": 256,
    }  # fmt: skip
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


class TinyWeights:
    """Random numbers by the parameter's name, large enough that greedy text does not repeat one token."""

    place = "tiny weights"

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> None:
        self._shapes = shapes
        self._seed = seed

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def load(self, name: str) -> HostTensor:
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        values = np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(self._shapes[name]) * 0.2
        return HostTensor.of((values + (1 if name.endswith("norm.weight") else 0)).astype(np.float32))


def load_tiny(
    device: Device,
    config: ModelConfig,
    *,
    form: WeightForm = WeightForm("float32"),
    source: WeightSource | None = None,
) -> LoadedModel:
    """`source`: of the whole model; if not given, `TinyWeights`."""
    share, source = ModelShare.of(device.ranks), source or TinyWeights(config.parameter_shapes())
    placed = PlacedWeights(share_of(source, config, share, form=form), device, form)
    model = build_decoder(config, placed, device)
    return LoadedModel(model, config, form, "0" * 32, weights_bytes=placed.num_bytes, load_s=0.0, share=share)


def own_kernels(folder: Path) -> KernelLibrary | None:
    """A copy of the kernels' library, with a pool of threads of its own. None without a compiler."""
    library = kernel_library()
    if library is None:
        return None
    folder.mkdir(parents=True)
    return KernelLibrary(Path(shutil.copy(library.path, folder)), library.isa)


def tiny_device(*, library: KernelLibrary | None, ranks: CpuRanks | None = None) -> CpuDevice:
    device = CpuDevice(num_threads=1, use_kernels=False, ranks=ranks)
    device._library = library
    return device


def tiny_runner(device: CpuDevice, config: ModelConfig, *, form: WeightForm = WeightForm("float32")) -> CpuRunner:
    return runner_of(load_tiny(device, config, form=form), device)


def runner_of(loaded: LoadedModel, device: CpuDevice) -> CpuRunner:
    layout = loaded.kv_layout(page_size=8, dtype="float32")
    return CpuRunner(loaded, device, layout=layout, num_pages=120, max_running=_SLOTS)


class RankedRunner:
    """Rank 0 in this thread, the others in threads of their own that get the same plans."""

    def __init__(self, runners: list[CpuRunner], groups: list[CpuRanks]) -> None:
        self.runners = runners
        self.groups = groups
        self._plans: list[queue.Queue[StepPlan | None]] = [queue.Queue() for _ in runners[1:]]
        self.errors: list[BaseException] = []
        self.threads = [
            threading.Thread(target=self._follow, args=it, daemon=True)
            for it in zip(runners[1:], self._plans, strict=True)
        ]
        for thread in self.threads:
            thread.start()

    @property
    def kv(self) -> KVMemory:
        return self.runners[0].kv

    def launch(self, plan: StepPlan) -> ComputedStep:
        for plans in self._plans:
            plans.put(plan)
        return self.runners[0].launch(plan)

    def _follow(self, runner: CpuRunner, plans: "queue.Queue[StepPlan | None]") -> None:
        while (plan := plans.get()) is not None:
            try:
                runner.launch(plan)
            except Exception as error:
                self.errors.append(error)
            finally:
                plans.task_done()

    def wait_idle(self) -> None:
        """Wait until the other ranks have left every step, which rank 0 may do before them."""
        for plans in self._plans:
            plans.join()

    def close(self) -> None:
        for plans in self._plans:
            plans.put(None)
        for thread in self.threads:
            thread.join(_WAIT_S)
            assert not thread.is_alive(), "a rank hangs"


@contextmanager
def ranked_runner(
    size: int,
    config: ModelConfig,
    folder: Path,
    *,
    has_kernels: bool,
    form: WeightForm = WeightForm("float32"),
    load: Callable[[CpuDevice], LoadedModel] | None = None,
) -> Iterator[RankedRunner]:
    """`folder` is for copies of the kernels. `load`: the model of `config`; if not given, one of `TinyWeights`."""
    num_bytes = rank_buffer_bytes(
        size=size, hidden_size=config.hidden_size, vocab_size=config.vocab_size, max_step_tokens=400
    )
    segment = RankSegment.create(size=size, buffer_bytes=num_bytes, num_slots=_SLOTS)
    groups = [CpuRanks(segment, rank=rank, limit_s=_WAIT_S) for rank in range(size)]
    load = load or partial(load_tiny, config=config, form=form)
    devices = [
        tiny_device(library=own_kernels(folder / f"rank{group.rank}") if has_kernels else None, ranks=group)
        for group in groups
    ]
    runners = [runner_of(load(device), device) for device in devices]
    ranked = RankedRunner(runners, groups)
    try:
        yield ranked
    finally:
        ranked.close()
        segment.close()
