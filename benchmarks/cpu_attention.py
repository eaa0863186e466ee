#!/usr/bin/env python3
"""Attention of one step on this CPU, all layers of SmolLM2-135M, beside what memory and arithmetic units allow.

    cpu_attention.py [--threads N] [--dtype float32] [--repeats 7] [CASE ...]

A case is ROWSxCONTEXT (decode: one token a row), ROWSxCONTEXT/SHARED (the rows share their first tokens' pages), or
QUERIES+CACHED (prefill of one row). Each layer has its own KV, so
what a step reads comes from memory (a small case fits in the last cache). The floor is the longer one of two times: the
bytes of the visible keys and values at the read bandwidth, and the multiplications at the rate of fused multiply-adds
in registers. Both rates are measured before and after each case; the better one counts. HEADWATER_CPU_ISA chooses the
instruction set.
"""

import argparse
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headwater.devices.cpu.attention_kernels import KV_DTYPES, AttentionJob, partial_arrays, work_list
from headwater.devices.cpu.kernel_library import KernelLibrary, Step, kernel_library
from headwater.devices.cpu.machine_speed import measure_speed
from headwater.devices.cpu.topology import num_usable_cores

CASES = ("1x200", "16x200", "16x1550", "16x1550/1500", "1x8000", "512+0", "512+1288")
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 30, 9, 3, 64, 16  # SmolLM2-135M
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


class Op(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_void_p), ("job", ctypes.c_void_p))


@dataclass
class Machine:
    library: KernelLibrary
    num_threads: int

    def run(self, names: list[str], jobs: Sequence[ctypes.Structure], step: Step) -> np.ndarray:
        """Run one op per job; returns the nanoseconds of each."""
        addresses = [ctypes.addressof(self.library.kernel(name)) for name in names]
        ops = (Op * len(jobs))(*((kernel, ctypes.addressof(job)) for kernel, job in zip(addresses, jobs, strict=True)))
        op_ns = np.zeros(len(jobs), dtype=np.int64)
        self.library.functions.hw_run(
            ops, ctypes.c_int64(len(jobs)), ctypes.byref(step), ctypes.c_int64(self.num_threads),
            ctypes.c_void_p(op_ns.ctypes.data),
        )  # fmt: skip
        return op_ns

    def rates(self) -> tuple[float, float]:
        """GB/s and GFLOP/s at best."""
        speed = measure_speed(self.library, num_threads=self.num_threads)
        return speed.read_gb_s, speed.gflop_s


class Case:
    """The jobs of all layers, and a step of random inputs."""

    def __init__(self, name: str, *, dtype: str, num_threads: int) -> None:
        name, _, shared = name.partition("/")
        num_shared = int(shared or 0) // PAGE_SIZE
        num_decodes = 0
        if "x" in name:
            rows, context = map(int, name.split("x"))
            query_lens = np.ones(rows, dtype=np.int32)
            num_decodes = rows
        else:
            queries, cached = map(int, name.split("+"))
            rows, context = 1, queries + cached
            query_lens = np.array([queries], dtype=np.int32)
        random = np.random.default_rng(0)
        num_tokens, num_pages = int(query_lens.sum()), -(-context // PAGE_SIZE)
        layer_bytes = 2 * NUM_KV_HEADS * PAGE_SIZE * HEAD_DIM * ITEM_BYTES[dtype]
        layer_bytes += 2 * NUM_KV_HEADS * PAGE_SIZE if dtype.startswith("float8") else 0
        memory = np.zeros((rows * num_pages, NUM_LAYERS * layer_bytes), dtype=np.uint8)
        if dtype == "float32":
            memory.view(np.float32)[:] = random.random(memory.shape[1] // 4, dtype=np.float32)
        else:
            memory[:] = random.integers(0x30, 0x3C, memory.shape[1])  # normal numbers in every format
        tables = random.permutation(rows * num_pages).reshape(rows, num_pages).astype(np.int32)
        tables[:, :num_shared] = tables[0, :num_shared]
        starts = np.concatenate(([0], np.cumsum(query_lens))).astype(np.int32)
        contexts = np.full(rows, context, dtype=np.int32)
        positions = np.concatenate([np.arange(context - n, context) for n in query_lens]).astype(np.int32)
        work = work_list(
            starts, contexts, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, num_threads=num_threads,
            page_tables=tables, page_size=PAGE_SIZE, num_decodes=num_decodes,
        )  # fmt: skip
        width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        arrays = {
            "qkv": random.normal(size=(num_tokens, width)).astype(np.float32),
            "cos": np.ones((num_tokens, HEAD_DIM // 2), dtype=np.float32),
            "sin": np.zeros((num_tokens, HEAD_DIM // 2), dtype=np.float32),
            "out": np.zeros((num_tokens, NUM_HEADS * HEAD_DIM), dtype=np.float32),
            **partial_arrays(num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM),
        }
        self._alive = (memory, tables, starts, contexts, positions, work, arrays)
        self.step = Step(
            num_tokens=num_tokens, num_rows=rows, positions=positions.ctypes.data, query_starts=starts.ctypes.data,
            context_lens=contexts.ctypes.data, page_tables=tables.ctypes.data, table_stride=num_pages,
            kv=memory.ctypes.data, chunks=work.chunks.ctypes.data, num_chunks=len(work.chunks),
            queries_per_chunk=work.queries_per_chunk, partial_slots=work.partial_slots.ctypes.data,
            next_sharing=work.next_sharing.ctypes.data, num_decodes=num_decodes,
        )  # fmt: skip
        self.jobs = [
            AttentionJob(
                num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, kv_dtype=KV_DTYPES.index(dtype),
                page_size=PAGE_SIZE, page_bytes=memory.shape[1], layer_offset=layer * layer_bytes, scale=0.125,
                **{name: array.ctypes.data for name, array in arrays.items()},
            )
            for layer in range(NUM_LAYERS)
        ]  # fmt: skip
        num_tokens = rows * context - (rows - 1) * num_shared * PAGE_SIZE
        self.num_bytes = num_tokens * NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM * ITEM_BYTES[dtype]
        self.num_flops = 4 * HEAD_DIM * NUM_HEADS * NUM_LAYERS * int((positions.astype(np.int64) + 1).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    parser.add_argument("--dtype", choices=KV_DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    library = kernel_library()
    if library is None:
        parser.error("there are no kernels for this CPU")
    machine = Machine(library, args.threads)
    print(f"{library.isa.name}, {args.threads} threads, KV {args.dtype}, ms: best (median) of {args.repeats} steps\n")
    print("| step | attention | prepare_qkv | floor | floor / best | GB/s | GFLOP/s | peak GB/s, GFLOP/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.cases:
        measure(name, machine, dtype=args.dtype, repeats=args.repeats)


def measure(name: str, machine: Machine, *, dtype: str, repeats: int) -> None:
    case = Case(name, dtype=dtype, num_threads=machine.num_threads)
    rates = [machine.rates()]
    names = ["prepare_qkv", "attention"] * NUM_LAYERS
    jobs = [job for job in case.jobs for _ in range(2)]
    times = [machine.run(names, jobs, case.step).reshape(-1, 2).sum(axis=0) / 1e6 for _ in range(repeats + 1)][1:]
    prepare, attention = np.array(times).T
    best = attention.min()
    rates.append(machine.rates())
    gb_per_s, gflop_per_s = np.max(rates, axis=0)
    memory_ms, flop_ms = case.num_bytes / gb_per_s / 1e6, case.num_flops / gflop_per_s / 1e6
    floor = max(memory_ms, flop_ms)
    bound = "memory" if memory_ms > flop_ms else "FMA"
    print(
        f"| {name} | {best:.2f} ({np.median(attention):.2f}) | {prepare.min():.2f} | {floor:.2f} ({bound}) | "
        f"{100 * floor / best:.0f} % | {case.num_bytes / best / 1e6:.1f} | {case.num_flops / best / 1e6:.0f} | "
        f"{gb_per_s:.1f}, {gflop_per_s:.0f} |"
    )


if __name__ == "__main__":
    main()
