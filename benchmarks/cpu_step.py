#!/usr/bin/env python3
"""The time of one step of the model runner on the CPU, and the machine's best possible time in the same minute.

    cpu_step.py [--model PATH] [--dtype auto] [--no-native] [--threads N] [--repeat 20] [--json FILE]

Decode steps of 1 to 64 rows and prefill chunks run without HTTP, tokenizer or scheduler. The floor of a step is the
longer one of two times: its bytes (weights and KV) at the read bandwidth, and its multiplications at the rate of a
large matrix product in float32. Both rates are the better ones of measurements directly before and after the step.
Compare runs by `ratio`, not by milliseconds, since the floor also varies on a shared machine. A ratio below 1 means
that another process used a core while the floor was measured; ignore such a case.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from headwater.devices.cpu.device import CpuDevice
from headwater.execution.cpu_runner import CpuRunner
from headwater.execution.warm_up import warm_up
from headwater.launch.default_model import ensure_default_model
from headwater.messages.generation import SamplingParams
from headwater.models.config import ModelConfig
from headwater.models.loader import load_model, resolve_model
from headwater.scheduling.plan import NEWEST_TOKEN, PageUpdate, SlotAssignment, StepPlan

PAGE_SIZE = 16
MAX_ROWS = 64
DECODES = ((1, 200), (4, 200), (16, 200), (64, 200), (1, 4000), (16, 1000))  # rows, context
PREFILLS = ((128, 0), (512, 0), (2048, 0), (512, 1536))  # tokens of the chunk, computed before
GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Measured:
    """The result of one case. `ratio` is the best time divided by the floor: 1.0 is the machine's limit."""

    case: str
    best_ms: float
    median_ms: float
    tokens_per_s: float  # at the median
    floor_ms: float
    ratio: float
    read_gb_s: float
    matmul_gflops: float


class Slots:
    """Requests with a given context, each in its own slot and pages. The KV of the context is arbitrary."""

    def __init__(self, runner: CpuRunner, vocab_size: int) -> None:
        self._runner = runner
        self._random = np.random.default_rng(0)
        self._vocab_size = vocab_size
        self._use = 0

    def place(self, num_rows: int, context: int, prompt: int) -> Callable[[], StepPlan]:
        """Place `num_rows` requests with `context` computed tokens; return a function that plans their next step.

        Each plan assigns the slots again, so that a case repeats the same step.
        """
        self._use += 1
        pages_each = -(-(context + prompt) // PAGE_SIZE)
        pages = self._random.permutation(self._runner.kv.num_pages)[: num_rows * pages_each].astype(np.int32)
        token_ids = self._random.integers(0, self._vocab_size, prompt).astype(np.int32)
        updates = tuple(
            PageUpdate(slot=row, first=0, pages=pages[row * pages_each : (row + 1) * pages_each])
            for row in range(num_rows)
        )
        assignments = tuple(
            SlotAssignment(
                slot=row,
                use=self._use,
                sampling=GREEDY,
                token_ids=token_ids,
                num_prompt_tokens=prompt,
                stop_token_ids=(),
            )
            for row in range(num_rows)
        )
        first = _plan(self._use, num_rows, context, np.tile(token_ids, num_rows), assignments, updates)
        if prompt > 1:
            return lambda: first
        self._runner.launch(first)  # a decode needs a previous token
        newest = np.full(num_rows, NEWEST_TOKEN, dtype=np.int32)
        return lambda: _plan(self._use, num_rows, context, newest, (), ())


def _plan(
    use: int,
    num_rows: int,
    context: int,
    token_ids: np.ndarray,
    assignments: tuple[SlotAssignment, ...],
    updates: tuple[PageUpdate, ...],
) -> StepPlan:
    per_row = len(token_ids) // num_rows
    return StepPlan(
        step_id=0,
        assignments=assignments,
        page_updates=updates,
        slots=np.arange(num_rows, dtype=np.int32),
        uses=np.full(num_rows, use, dtype=np.int64),
        num_computed=np.full(num_rows, context, dtype=np.int32),
        num_tokens=np.full(num_rows, per_row, dtype=np.int32),
        samples=np.ones(num_rows, dtype=np.bool_),
        token_ids=token_ids,
        num_decodes=0 if assignments else num_rows,
        num_outputs=np.zeros(num_rows, dtype=np.int32),
    )


def read_bandwidth_gb_s(buffer: torch.Tensor) -> float:
    """The best bandwidth of a few sums over a buffer much larger than the caches."""
    return buffer.nbytes / _best_s(buffer.sum, 4) / 1e9


def matmul_gflops(size: int = 1024) -> float:
    x = torch.randn(size, size)
    return 2 * size**3 / _best_s(lambda: x @ x, 6) / 1e9


def _best_s(function: Callable[[], object], repeat: int) -> float:
    return min(_times_s(function, repeat))


def _times_s(function: Callable[[], object], repeat: int) -> list[float]:
    times = []
    for _ in range(repeat):
        start_s = time.perf_counter()
        function()
        times.append(time.perf_counter() - start_s)
    return times


def num_multiplications(config: ModelConfig, num_rows: int, context: int, prompt: int) -> int:
    """Multiply-adds of the layers for all tokens, the head for one token per row, and causal attention."""
    shapes = config.parameter_shapes()
    head = config.vocab_size * config.hidden_size
    in_layers = sum(int(np.prod(shape)) for name, shape in shapes.items() if ".layers." in name)
    keys = sum(context + i + 1 for i in range(prompt))
    attention = 2 * keys * config.q_size * config.num_layers
    return num_rows * (in_layers * prompt + head + attention)


def measure(
    name: str,
    runner: CpuRunner,
    make_plan: Callable[[], StepPlan],
    *,
    num_bytes: int,
    num_muls: int,
    num_tokens: int,
    repeat: int,
) -> Measured:
    buffer = torch.ones(64 << 20)
    before = read_bandwidth_gb_s(buffer), matmul_gflops()
    times = _times_s(lambda: runner.launch(make_plan()).collect(), repeat)
    after = read_bandwidth_gb_s(buffer), matmul_gflops()
    bandwidth, gflops = (max(pair) for pair in zip(before, after, strict=True))
    floor_s = max(num_bytes / bandwidth / 1e9, 2 * num_muls / gflops / 1e9)
    return Measured(
        case=name,
        best_ms=min(times) * 1e3,
        median_ms=statistics.median(times) * 1e3,
        tokens_per_s=num_tokens / statistics.median(times),
        floor_ms=floor_s * 1e3,
        ratio=min(times) / floor_s,
        read_gb_s=bandwidth,
        matmul_gflops=gflops,
    )


def run_cases(runner: CpuRunner, config: ModelConfig, repeat: int) -> list[Measured]:
    slots = Slots(runner, config.vocab_size)
    weights = runner.memory_bytes()["weights"]
    token_bytes = runner.kv.layout.token_bytes
    results = []
    cases = [(f"decode {rows} x {context}", rows, context, 1) for rows, context in DECODES]
    cases += [(f"prefill {prompt} after {context}", 1, context, prompt) for prompt, context in PREFILLS]
    for name, rows, context, prompt in cases:
        result = measure(
            name,
            runner,
            slots.place(rows, context, prompt),
            num_bytes=int(weights + rows * (context + prompt) * token_bytes),
            num_muls=num_multiplications(config, rows, context, prompt),
            num_tokens=rows * prompt,
            repeat=repeat if prompt == 1 else max(3, repeat // 5),
        )
        print(
            f"{result.case:24} best {result.best_ms:8.2f} ms  median {result.median_ms:8.2f} ms  "
            f"{result.tokens_per_s:8.1f} tok/s  floor {result.floor_ms:8.2f} ms  ratio {result.ratio:5.2f}  "
            f"({result.read_gb_s:.0f} GB/s, {result.matmul_gflops:.0f} GFLOP/s)",
            flush=True,
        )
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, .gguf file or hub id; the default model if left out")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-native", action="store_true", help="plain numpy, without the kernels")
    parser.add_argument("--repeat", type=int, default=20, help="steps per decode case")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    device = CpuDevice(num_threads=args.threads, use_kernels=not args.no_native)
    loaded = load_model(resolve_model(args.model or str(ensure_default_model())), device=device, dtype=args.dtype)
    num_pages = max(rows * -(-(context + 1) // PAGE_SIZE) for rows, context in DECODES)
    layout = loaded.kv_layout(page_size=PAGE_SIZE)
    runner = CpuRunner(loaded, device, layout=layout, num_pages=num_pages, max_running=MAX_ROWS)
    warm_up(runner)
    results = run_cases(runner, loaded.config, args.repeat)
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
