#!/usr/bin/env python3
"""What LoRA adapters cost: steps of mixed batches, against the same steps of the base model alone.

    lora.py [--model PATH] [--load-format dummy] [--device cpu|cuda] [--adapters 8] [--rank 16] [--repeat 5]
            [--case 16x200 64x200 512+0] [--kernels] [--out RECORD.json]
    lora.py --shape llama3.1-8b --device cuda     # a shape of benchmarks/gpu/shapes.py, with random weights

The rows of a step have the adapters in turn, all projections adapted; a prompt chunk has one. Every round measures
first the base alone, then the adapters, and the best of each is compared. Without --model it is the default model.
--kernels shows where the time of a step goes on a GPU.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from headwater.devices.adapters import random_adapter
from headwater.devices.cpu.adapters.memory import CpuAdapters
from headwater.devices.cpu.device import CpuDevice
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.runner import Runner
from headwater.launch.default_model import ensure_default_model
from headwater.models.loader import LoadedModel, load_model, resolve_model
from headwater.models.ranks.adapter_share import adapter_shape
from headwater.profiling.step_cases import StepCase, StepMaker
from headwater.scheduling.plan import StepHandle, StepPlan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))  # shapes and profile_run, which need more
PAGE_SIZE = 16
GOAL = 0.85  # of the base model's throughput


@dataclass(frozen=True)
class Result:
    """Seconds of a step, the best of all rounds."""

    case: str
    num_adapters: int
    rank: int
    base_s: float
    adapters_s: float

    @property
    def share(self) -> float:
        return self.base_s / self.adapters_s


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--shape")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--case", nargs="+", default=["16x200", "64x200", "512+0"])
    parser.add_argument("--cpu-time", action="store_true", help="of all threads, for a machine that others use")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    cases = [StepCase.parse(text) for text in options.case]
    with tempfile.TemporaryDirectory() as root:
        loaded, runner = _runner(options, cases, Path(root))
    _fill(runner, loaded, options)
    results = []
    for case in cases:
        result = _measure(runner, case, options)
        results.append(asdict(result) | {"share": round(result.share, 3)})
        if options.kernels and options.device == "cuda":
            results[-1]["kernels"] = {num: _kernels(runner, case, num) for num in (0, options.adapters)}
        print(
            f"{case.name:24} base {1e3 * result.base_s:8.2f} ms, {result.num_adapters} adapters of rank "
            f"{result.rank}: {1e3 * result.adapters_s:8.2f} ms, {100 * result.share:5.1f} % of the base's throughput"
            f"{'' if result.share >= GOAL else f'; the goal is {100 * GOAL:.0f} %'}",
            flush=True,
        )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _runner(options: argparse.Namespace, cases: Sequence[StepCase], root: Path) -> tuple[LoadedModel, Runner]:
    load_format = options.load_format
    if options.shape:
        from shapes import make_model

        model, load_format = str(make_model(options.shape, root)), "dummy"
    else:
        model = options.model or str(ensure_default_model())
    num_pages = max(case.num_pages(PAGE_SIZE) for case in cases) + 1
    max_running = max(case.num_rows for case in cases)
    num_slots = options.adapters + 1
    if options.device == "cpu":
        device = CpuDevice(num_threads=options.threads)
        loaded = load_model(resolve_model(model), device=device, dtype=options.dtype, load_format=load_format)
        shape = adapter_shape(loaded.config, num_slots=num_slots, max_rank=options.rank)
        memory = CpuAdapters(device.library, shape, form=loaded.dtype)
        layout = loaded.kv_layout(page_size=PAGE_SIZE)
        runner = CpuRunner(
            loaded, device, layout=layout, num_pages=num_pages, max_running=max_running, adapters=memory
        )
        return loaded, runner
    from headwater.devices.cuda.adapters import CudaAdapters
    from headwater.devices.cuda.device import CudaDevice
    from headwater.execution.gpu_runner import GpuRunner

    gpu = CudaDevice()
    loaded = load_model(resolve_model(model), device=gpu, dtype=options.dtype, load_format=load_format)
    shape = adapter_shape(loaded.config, num_slots=num_slots, max_rank=options.rank)
    return loaded, GpuRunner(
        loaded,
        gpu,
        layout=loaded.kv_layout(page_size=PAGE_SIZE),
        num_pages=num_pages,
        max_running=max_running,
        max_context=max(case.context + case.num_new + 1 for case in cases),
        graph_sizes=tuple(sorted({case.num_rows for case in cases if case.is_decode})),
        adapters=CudaAdapters(shape, form=loaded.dtype, device=gpu.torch_device),
    )


def _fill(runner: Runner, loaded: LoadedModel, options: argparse.Namespace) -> None:
    memory = runner.adapters
    assert memory is not None
    for slot in range(1, options.adapters + 1):
        adapter = random_adapter(memory.shape, rank=options.rank, seed=slot, form=loaded.dtype)
        memory.place(slot, memory.prepare(adapter))
    print(f"{options.adapters} adapters take {memory.num_bytes / 1e6:.0f} MB", flush=True)


class _Rows:
    """A runner whose rows all get adapters, or none."""

    def __init__(self, runner: Runner, num_adapters: int) -> None:
        self.kv, self.model = runner.kv, runner.model
        self._runner = runner
        self._num_adapters = num_adapters

    def launch(self, plan: StepPlan) -> StepHandle:
        if self._num_adapters:
            changed = [structs.replace(it, adapter=1 + it.slot % self._num_adapters) for it in plan.assignments]
            plan = structs.replace(plan, assignments=tuple(changed))
        return self._runner.launch(plan)


def _measure(runner: Runner, case: StepCase, options: argparse.Namespace) -> Result:
    best = {0: float("inf"), options.adapters: float("inf")}
    for _ in range(options.repeat):
        for num_adapters in best:
            rows = _Rows(runner, num_adapters)
            plan = StepMaker(rows).place(case)  # type: ignore[arg-type]
            best[num_adapters] = min(best[num_adapters], _time(rows, plan, uses_cpu_time=options.cpu_time))
    return Result(case.name, options.adapters, options.rank, best[0], best[options.adapters])


def _time(rows: _Rows, plan: Callable[[], StepPlan], *, uses_cpu_time: bool) -> float:
    """Seconds of one step: the best of several, in at least 0.3 s."""
    now_s = time.process_time if uses_cpu_time else time.perf_counter
    rows.launch(plan()).collect()
    times: list[float] = []
    while sum(times) < 0.3 or len(times) < 3:
        began_s = now_s()
        rows.launch(plan()).collect()
        times.append(now_s() - began_s)
    return min(times)


def _kernels(runner: Runner, case: StepCase, num_adapters: int) -> dict[str, Any]:
    """Time of a step by kernel, and how long the card did nothing in between (gpu/profile_run.py)."""
    import torch
    from profile_run import summary

    rows = _Rows(runner, num_adapters)
    plan = StepMaker(rows).place(case)  # type: ignore[arg-type]
    rows.launch(plan()).collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        rows.launch(plan()).collect()
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    return summary(
        sorted(
            (it.start_ns(), it.duration_ns(), it.name())
            for it in events
            if it.device_type() == torch.autograd.DeviceType.CUDA
        )
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
