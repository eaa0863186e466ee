#!/usr/bin/env python3
"""Where the time of a workload goes on a GPU: kernels by name, the card's idle time between them, and the steps.

    profile_run.py MODEL OUT.json [--cases one,decode,prefill,prefix,repeat] [--tp-size 2] [--quantization fp8]

one: decodes of a single stream. decode: of 64 streams. prefill: 64 prompts of 1,024 tokens. prefix: 64 prompts of 64
new tokens behind 4,096 cached ones (B4); repeat: the same once more. Random weights, as in engine_run.py. The profiler
itself costs a few per cent. Of several ranks, rank 0 is shown.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import Figures
from shapes import SHAPES, make_model

import workloads

GREEDY = {"temperature": 0, "ignore_eos": True}
NUM_KERNELS_TOLD = 14


@dataclass(frozen=True)
class Step:
    """A step as it was launched; its time on the card is between two events around its kernels."""

    started_s: float
    launched_s: float
    num_decodes: int
    num_prompt_tokens: int
    events: tuple[Any, Any]

    def told(self, since_s: float) -> dict[str, float]:
        """In ms. The card's events must be over."""
        return {
            "at": round((self.started_s - since_s) * 1e3, 1),
            "launch": round((self.launched_s - self.started_s) * 1e3, 2),
            "card": round(self.events[0].elapsed_time(self.events[1]), 2),
            "decodes": self.num_decodes,
            "prompt_tokens": self.num_prompt_tokens,
        }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", default="one,decode,prefill,prefix")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--quantization", default="none")
    options = parser.parse_args(argv)
    flags = {"attention_backend": options.attention_backend, "tp_size": options.tp_size}
    flags["quantization"] = options.quantization
    figures = Figures(options.out, {"model": options.model, **flags})
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.model, Path(root))
        run(folder, options.cases.split(","), figures, flags)
    return 0


def run(folder: Path, cases: Sequence[str], figures: Figures, flags: dict[str, Any]) -> None:
    from headwater import Engine

    with Engine(
        str(folder), load_format="dummy", device="cuda", **flags,
        context_length=8192, max_running_requests=256, log_level="warning",
    ) as engine:  # fmt: skip

        def generate(prompts: workloads.Prompts, lengths: Sequence[int]) -> int:
            params = [GREEDY | {"max_new_tokens": length} for length in lengths]
            return sum(len(it["output_ids"]) for it in engine.generate(input_ids=prompts, sampling_params=params))

        workloads.warm_up(generate)
        steps = record_steps()
        for name in cases:
            figures.put(name, profile(case(name, generate), steps))


def case(name: str, generate: workloads.Generate) -> Callable[[], object]:
    """What to profile; whatever it needs before has run, in full once so that nothing is new to the process."""
    if name == "prefill":
        prompts = [workloads.random_prompts(64, 1024, seed=seed) for seed in range(3)]
        generate(prompts.pop(), [1] * 64)
        return lambda: generate(prompts.pop(), [1] * 64)
    if name in ("prefix", "repeat"):
        prompts = workloads.prompts_with_shared_prefix(64, shared=4096, own=64, seed=3)
        new = [[p[:4096] + [(t * 7 + r) % 10_000 for t in p[4096:]] for p in prompts] for r in range(3)]
        generate(prompts, [1] * 64)
        generate(new.pop(), [1] * 64)
        return lambda: generate(new.pop() if name == "prefix" else prompts, [1] * 64)
    num = {"one": 1, "decode": 64}[name]
    prompts = workloads.random_prompts(num, 1024, seed=4)
    generate(prompts, [1] * num)
    return lambda: generate(prompts, [64] * num)


def record_steps() -> list[Step]:
    """Records of every launch from now on. The reader of the list clears it."""
    import torch

    from headwater.execution.gpu_runner import GpuRunner

    steps: list[Step] = []
    launch = GpuRunner.launch

    def noted(self: GpuRunner, plan: Any) -> Any:
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started_s = time.perf_counter()
        events[0].record()
        handle = launch(self, plan)
        events[1].record()
        num_prompt_tokens = int(plan.num_tokens[plan.num_decodes :].sum())
        steps.append(Step(started_s, time.perf_counter(), plan.num_decodes, num_prompt_tokens, events))
        return handle

    GpuRunner.launch = noted
    return steps


def profile(work: Callable[[], object], steps: list[Step]) -> dict[str, Any]:
    """Run once without the profiler, for the time and the steps, and once with it, for the kernels."""
    import torch

    steps.clear()
    started_s = time.perf_counter()
    work()
    wall_ms = (time.perf_counter() - started_s) * 1e3
    torch.cuda.synchronize()
    told = [step.told(started_s) for step in steps]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = profiler.profiler.kineto_results.events()
    kernels = [
        (e.start_ns(), e.duration_ns(), e.name()) for e in events if e.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return {"wall_ms": round(wall_ms, 2), "num_steps": len(told), "steps": told[:16], **summary(sorted(kernels))}


def summary(kernels: list[tuple[int, int, str]]) -> dict[str, Any]:
    """Of (start, duration, name) in ns: time of each kernel, and how long the card did nothing in between."""
    took: dict[str, list[int]] = defaultdict(list)
    gaps, busy_until = [], kernels[0][0] if kernels else 0
    for start, duration, name in kernels:
        took[name].append(duration)
        if start > busy_until:
            gaps.append(start - busy_until)
        busy_until = max(busy_until, start + duration)
    largest = sorted(took.items(), key=lambda item: -sum(item[1]))[:NUM_KERNELS_TOLD]
    return {
        "span_ms": round((busy_until - kernels[0][0]) / 1e6, 2) if kernels else 0.0,
        "idle_ms": round(sum(gaps) / 1e6, 2),
        "idle_in_gaps_over_50_us_ms": round(sum(gap for gap in gaps if gap > 50_000) / 1e6, 2),
        "kernels": {
            name[:90]: {"ms": round(sum(t) / 1e6, 3), "num": len(t), "mean_us": round(sum(t) / len(t) / 1e3, 2)}
            for name, t in largest
        },
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
