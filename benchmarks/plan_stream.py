"""The cost of the plan stream: what publishing a step's plan takes from the engine's thread, and when ranks have it.

64 decode rows go to the other ranks of a tensor parallel engine, which read each plan and do nothing else. Every
sixteenth step of a row takes a new page. In the pause between two plans, that of a small model's step, all of them
sleep, so nothing of the writer is in a cache. Compare figures of quiet machines only.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headwater.ranks.plan_codec import read_plan, write_plan
from headwater.ranks.plan_stream import PlanStream, StreamReader, ring_bytes
from headwater.ranks.shared_memory import SharedMemory
from headwater.scheduling.plan import NEWEST_TOKEN, PageUpdate, StepPlan

sys.path.append(str(Path(__file__).resolve().parent / "serving"))
from results import save

PAGE_SIZE = 16


def decodes(step_id: int, num_rows: int) -> StepPlan:
    """The plan of a step in which every row decodes; a sixteenth of the rows begins a page."""
    slots = np.arange(num_rows, dtype=np.int32)
    new_pages = [slot for slot in range(num_rows) if (slot + step_id) % PAGE_SIZE == 0]
    return StepPlan(
        step_id=step_id,
        assignments=(),
        page_updates=tuple(PageUpdate(slot, 7, np.array([slot], dtype=np.int32)) for slot in new_pages),
        slots=slots,
        uses=slots.astype(np.int64),
        num_computed=slots + step_id,
        num_tokens=np.ones(num_rows, dtype=np.int32),
        samples=np.ones(num_rows, dtype=np.bool_),
        token_ids=np.full(num_rows, NEWEST_TOKEN, dtype=np.int32),
        num_decodes=num_rows,
        num_outputs=slots + step_id,
    )


def read_all(reader: StreamReader, report_fd: int) -> None:
    """What a rank process does with plans; writes when it had each."""
    had: list[float] = []
    while (record := reader.take()) is not None:
        plan = read_plan(record, ())
        assert plan.num_rows == plan.num_decodes
        had.append(time.perf_counter())
    os.write(report_fd, np.array(had).tobytes())


def measure(num_ranks: int, *, num_rows: int, num_steps: int, pause_s: float) -> dict[str, Any]:
    """Publish plans to `num_ranks - 1` processes, `pause_s` apart."""
    num_readers = num_ranks - 1
    size = ring_bytes(num_readers, largest_body=1 << 20)
    memory = SharedMemory.create(size)
    wakes, reports = ([os.pipe() for _ in range(num_readers)] for _ in range(2))
    children = []
    for index in range(num_readers):
        child = os.fork()
        if child == 0:
            for _, write_fd in wakes:
                os.close(write_fd)
            reader = StreamReader(memory, wakes[index][0], index=index, num_readers=num_readers)
            read_all(reader, reports[index][1])
            os._exit(0)
        children.append(child)
    writer = PlanStream(memory, [pipe[1] for pipe in wakes])
    plans = [decodes(step_id, num_rows) for step_id in range(num_steps)]
    began, took, took_cpu = [], [], []
    for plan in plans:
        time.sleep(pause_s)
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        write_plan(writer, plan)
        took.append(time.perf_counter() - began_s)
        took_cpu.append(time.thread_time() - began_cpu_s)
        began.append(began_s)
    for _, write_fd in wakes:
        os.close(write_fd)
    had = [_read_times(reports[index][0], num_steps) for index in range(num_readers)]
    for child in children:
        os.waitpid(child, 0)
    last = np.max(had, axis=0) - began
    return {
        "num_ranks": num_ranks,
        "num_rows": num_rows,
        "num_steps": num_steps,
        "pause_ms": pause_s * 1e3,
        "publish_us": _summary(took),
        "publish_cpu_us": _summary(took_cpu),
        "last_rank_has_it_us": _summary(last.tolist()),
    }


def _read_times(fd: int, num_steps: int) -> np.ndarray:
    data = b""
    while len(data) < 8 * num_steps:
        part = os.read(fd, 1 << 16)
        assert part, "a reader died"
        data += part
    return np.frombuffer(data)


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    p99 = sorted(seconds)[int(0.99 * len(seconds))]
    return {"median": round(statistics.median(seconds) * 1e6, 1), "p99": round(p99 * 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pause-ms", type=float, default=2.0)
    parser.add_argument("--name", help="save the figures in results/ under this name")
    args = parser.parse_args()
    found = [
        measure(num_ranks, num_rows=args.rows, num_steps=args.steps, pause_s=args.pause_ms / 1e3)
        for num_ranks in args.ranks
    ]
    for each in found:
        publish, cpu, last = each["publish_us"], each["publish_cpu_us"], each["last_rank_has_it_us"]
        print(
            f"TP {each['num_ranks']}, {each['num_rows']} rows: publishing takes {publish['median']} us "
            f"(p99 {publish['p99']}; {cpu['median']} us of CPU), "
            f"the last rank has the plan after {last['median']} us (p99 {last['p99']})"
        )
    if args.name:
        print(save(args.name, [], servers={"plan_stream": found}))


if __name__ == "__main__":
    main()
