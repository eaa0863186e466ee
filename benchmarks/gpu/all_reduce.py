#!/usr/bin/env python3
"""Sums over the GPUs of one host, and what they cost a step: NCCL against our own kernel, one call for all figures.

    all_reduce.py OUT.json [--ranks 2] [--parts sums one_shot nccl alone] [--limit-s 100] [--model llama3.1-8b]

Each part has processes of its own, one for each rank, and a time limit. `sums`: 8 KiB to 1 MiB of bfloat16 in CUDA
graphs. The others are decode steps of the model with random weights: on all GPUs with our kernel, if it passes its
self-test, or with NCCL, and on one GPU. A part that fails or takes too long is ended; the exit status says so, and the
next part runs.
"""

import argparse
import faulthandler
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from figures import Figures
from shapes import make_model

from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.ranks.group import CudaRanks
from headwater.devices.cuda.ranks.one_shot import OneShot
from headwater.execution.gpu_runner import GpuRunner
from headwater.messages.generation import SamplingParams
from headwater.models.loader import load_model, resolve_model
from headwater.scheduling.plan import NEWEST_TOKEN, PageUpdate, SlotAssignment, StepPlan

INNER = 50  # sums of a graph
REPEATS = 30
SIZES = [8192 << i for i in range(10)]
PARTS = ("sums", "one_shot", "nccl", "alone")
GRACE_S = 5.0  # for the others, after a rank has failed
PAGE = 16
CONTEXT = 1024
BATCHES = (1, 64)


def timed_us(enqueue: Callable[[], object]) -> float:
    """Median microseconds of one of the INNER calls in a CUDA graph."""
    enqueue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(INNER):
            enqueue()
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / INNER)
    return sorted(times)[len(times) // 2]


def time_sums(ranks: CudaRanks, figures: Figures | None) -> None:
    own: OneShot | None = ranks.one_shot
    put(figures, "one_shot_passes_its_test", own is not None)
    for num_bytes in SIZES:
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=ranks.torch_device)
        residual = torch.zeros(num_bytes // 2, dtype=torch.float32, device=ranks.torch_device)
        put(figures, f"nccl_{num_bytes >> 10}_kib_us", timed_us(lambda x=x: dist.all_reduce(x)))
        if own is not None and own.suits(x):
            put(figures, f"one_shot_{num_bytes >> 10}_kib_us", timed_us(lambda x=x: own.all_reduce(x)))
            added = timed_us(lambda x=x, residual=residual: own.add_reduced(residual, x))
            put(figures, f"one_shot_add_{num_bytes >> 10}_kib_us", added)


def put(figures: Figures | None, name: str, value: object) -> None:
    if figures is not None:
        figures.put(name, value)


def decode_plan(num_rows: int, *, is_first: bool) -> StepPlan:
    """Greedy decodes of `num_rows` slots behind CONTEXT tokens."""
    pages_per_row = CONTEXT // PAGE + 1
    assignments = [
        SlotAssignment(
            slot=slot, use=1, sampling=SamplingParams(temperature=0.0), token_ids=np.zeros(CONTEXT, dtype=np.int32),
            num_prompt_tokens=CONTEXT, stop_token_ids=(),
        )
        for slot in range(num_rows)
    ]  # fmt: skip
    updates = [
        PageUpdate(slot, 0, np.arange(slot * pages_per_row, (slot + 1) * pages_per_row, dtype=np.int32))
        for slot in range(num_rows)
    ]
    return StepPlan(
        step_id=0,
        assignments=tuple(assignments) if is_first else (),
        page_updates=tuple(updates) if is_first else (),
        slots=np.arange(num_rows, dtype=np.int32),
        uses=np.ones(num_rows, dtype=np.int64),
        num_computed=np.full(num_rows, CONTEXT, dtype=np.int32),
        num_tokens=np.ones(num_rows, dtype=np.int32),
        samples=np.ones(num_rows, dtype=np.bool_),
        token_ids=np.full(num_rows, NEWEST_TOKEN, dtype=np.int32),
        num_decodes=num_rows,
        num_outputs=np.ones(num_rows, dtype=np.int32),
        page_copies=(),
        grammar_rows=np.zeros(0, dtype=np.int32),
    )


def time_steps(name: str, device: CudaDevice, options: argparse.Namespace, figures: Figures | None) -> None:
    """Milliseconds of a decode step, two in flight as in the engine."""
    loaded = load_model(resolve_model(options.folder), device=device, dtype="bfloat16", load_format="dummy")
    num_pages = max(BATCHES) * (CONTEXT // PAGE + 1)
    runner = GpuRunner(
        loaded, device, layout=loaded.kv_layout(page_size=PAGE), num_pages=num_pages, max_running=max(BATCHES),
        max_context=2 * CONTEXT, graph_sizes=BATCHES,
    )  # fmt: skip
    runner.kv.memory.zero_()
    runner.capture_graphs()
    for num_rows in BATCHES:
        runner.launch(decode_plan(num_rows, is_first=True)).collect()
        plan = decode_plan(num_rows, is_first=False)
        before, began_s = runner.launch(plan), time.perf_counter()
        for _ in range(options.steps):
            after = runner.launch(plan)
            before.collect()
            before = after
        before.collect()
        put(figures, f"{name}_decode_{num_rows}_ms", (time.perf_counter() - began_s) * 1e3 / options.steps)
    put(figures, f"{name}_weights_gib", loaded.weights_bytes / (1 << 30))
    runner.replace_model(None)  # NCCL would wait for its graphs to go


def run_rank(options: argparse.Namespace) -> None:
    """One part in one process. Where it stands is printed shortly before its limit."""
    faulthandler.dump_traceback_later(max(1.0, options.limit_s - 5), exit=True)
    logging.basicConfig(format=f"rank {options.rank}: %(message)s", level=logging.WARNING)
    place = torch.device("cuda", options.rank)
    figures = None
    if options.rank == 0:
        path = Path(options.out)
        before = json.loads(path.read_text()) if path.exists() else {}
        figures = Figures(path, before | {"device": torch.cuda.get_device_name(), "ranks": options.ranks})
    if options.part == "alone":
        time_steps("alone", CudaDevice(place), options, figures)
        return
    ranks = CudaRanks(
        rank=options.rank, size=options.ranks, rendezvous=Path(options.rendezvous), torch_device=place,
        limit_s=options.limit_s, uses_one_shot=options.part != "nccl",
    )  # fmt: skip
    if options.part == "sums":
        time_sums(ranks, figures)
    elif options.part == "nccl" or ranks.one_shot is not None:
        time_steps(f"ranks_{options.part}", CudaDevice(ranks=ranks), options, figures)
    elif figures is not None:
        print("one_shot: no decodes, the self-test has failed", flush=True)
    ranks.close()


def run_part(part: str, options: argparse.Namespace, folder: Path, model: Path) -> bool:
    """Whether all ranks of a part ended well within the limit; none is left behind."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
    command += ["--folder", str(model), "--rendezvous", str(folder / f"meet-{part}")]
    num_ranks = 1 if part == "alone" else options.ranks
    began_s = time.monotonic()
    processes = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(num_ranks)]
    try:
        statuses = wait_for(processes, ends_s=began_s + options.limit_s)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, status in enumerate(statuses):
        if status != 0:
            what = "did not end" if status is None else f"ended with {status}"
            print(f"{part}: rank {rank} {what} after {time.monotonic() - began_s:.0f} s; figures may be missing")
    return not any(status != 0 for status in statuses)


def wait_for(processes: list[subprocess.Popen[bytes]], *, ends_s: float) -> list[int | None]:
    """Exit statuses when all have ended, or soon after one has failed; None: it has not ended."""
    while True:
        statuses = [process.poll() for process in processes]
        if any(status not in (None, 0) for status in statuses):
            ends_s = min(ends_s, time.monotonic() + GRACE_S)
        if None not in statuses or time.monotonic() > ends_s:
            return statuses
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", default="llama3.1-8b")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--limit-s", type=float, default=100.0, help="of each part")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options.model, Path(folder))
        ended_well = [run_part(part, options, Path(folder), model) for part in options.parts]
    return 0 if all(ended_well) else 1


if __name__ == "__main__":
    sys.exit(main())
