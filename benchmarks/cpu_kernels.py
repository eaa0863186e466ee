#!/usr/bin/env python3
"""The CPU kernels for products, one by one and as all products of a model, beside the machine's floor in that minute.

    cpu_kernels.py [--formats Q4_1 Q8_0 ...] [--shapes 576x1536 ...] [--rows 1 16 ...] [--model] [--threads N]

A shape is INPUTSxOUTPUTS. Weights are random and rotate through 192 MiB, so they come from memory. Products run in
the pool of recorded programs. The floor of a product is the longer one of two times: its weights at the read bandwidth,
and its operations at the rate of fused multiply-adds in registers. Both rates are measured before and after the
product; the better one counts. With one thread all times are CPU time, so that a busy machine disturbs them less.
`--model` runs the products of SmolLM2-135M in sequence, with their quantised activations, in one call; K-quants do not
fit its shapes. HEADWATER_CPU_ISA chooses the instruction set.
"""

import argparse
import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater.devices.cpu.kernel_build import compile_library
from headwater.devices.cpu.kernel_library import SELECTED, TOKENS, KernelLibrary, Step, kernel_library
from headwater.devices.cpu.linear_kernels import LinearJob, Mode, QuantizeJob
from headwater.devices.cpu.packed_weights import (
    BLOCK_COLS,
    FORMATS,
    PackedWeights,
    activation_bytes,
    converts_activations,
)
from headwater.devices.cpu.topology import num_usable_cores

ROTATION_BYTES = 192 << 20
HIDDEN, INTERMEDIATE, QKV, VOCABULARY, LAYERS = 576, 1536, 960, 49152, 30  # SmolLM2-135M


class Op(ctypes.Structure):
    """`Op` of kernels/step.h."""

    _fields_ = (("kernel", ctypes.c_void_p), ("job", ctypes.c_void_p))


class Machine:
    """The read bandwidth and the rate of multiply-adds of `threads` threads."""

    def __init__(self, library: KernelLibrary, threads: int) -> None:
        source = Path(__file__).with_name("cpu_floor.c")
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "floor.so"
        compile_library(library.isa, path, sources=[source])
        self._c = ctypes.CDLL(str(path))
        self._pool, self._threads = ThreadPoolExecutor(threads), threads
        self._memory = np.ones(ROTATION_BYTES // 4, np.float32)

    def read_gb_s(self) -> float:
        share = len(self._memory) // self._threads
        parts = [ctypes.c_void_p(self._memory[i * share :].ctypes.data) for i in range(self._threads)]
        seconds = self._best(lambda at: self._c.read_bytes(at, ctypes.c_int64(share)), parts)
        return share * self._threads * 4 / seconds / 1e9

    def gflop_s(self) -> float:
        count = 400_000
        seconds = self._best(lambda _: self._c.multiply_add(ctypes.c_int64(count)), range(self._threads))
        return self._c.operations_per_count() * count * self._threads / seconds / 1e9

    def _best(self, run: Callable[[Any], object], parts: Sequence[object]) -> float:
        return min(times(lambda: list(self._pool.map(run, parts)), 4, self._threads))


@dataclass
class Record:
    format: str
    shape: str
    rows: int
    best_us: float
    median_us: float
    gb_s: float
    gflop_s: float
    floor_us: float
    ratio: float  # of the best to the floor
    read_gb_s: float
    peak_gflop_s: float


def times(run: Callable[[], object], repeat: int, threads: int) -> list[float]:
    clock = time.process_time if threads == 1 else time.perf_counter
    found = []
    for _ in range(repeat):
        began = clock()
        run()
        found.append(clock() - began)
    return found


class Bench:
    def __init__(self, threads: int) -> None:
        library = kernel_library()
        assert library is not None, "no kernels: see the log"
        self.library, self.threads = library, threads
        self.machine = Machine(library, threads)
        self._rng = np.random.default_rng(0)
        self._run = library.functions.hw_run
        self._kept: list[object] = []

    def weights(self, format: str, in_features: int, out_features: int, *, is_gated: bool = False) -> PackedWeights:
        """Random packed weights; scales are those of random bytes, which cost the same time."""
        num_blocks = -(-out_features // BLOCK_COLS) * (2 if is_gated else 1)
        function = self.library.functions.hw_block_bytes
        function.restype = ctypes.c_int64
        size = function(ctypes.c_int64(FORMATS.index(format)), ctypes.c_int64(in_features))
        whole = np.zeros(num_blocks * size + 64, np.uint8)
        begin = -whole.ctypes.data % 64
        whole[:] = np.resize(self._rng.integers(0, 60, 1 << 16, dtype=np.uint8), len(whole))  # finite in each format
        blocks = whole[begin : begin + num_blocks * size].reshape(num_blocks, size)
        return PackedWeights(format, in_features, out_features, is_gated, blocks, None)

    def activations(self, format: str, in_features: int, rows: int) -> np.ndarray:
        return np.zeros(rows * activation_bytes(self.library, format, in_features) + 64, np.uint8)

    def floats(self, rows: int, width: int) -> np.ndarray:
        return self._rng.normal(size=(rows, width)).astype(np.float32)

    def linear(self, packed: PackedWeights, x: np.ndarray, y: np.ndarray, mode: Mode, rows: int = TOKENS) -> Op:
        self._kept += [packed, x, y]
        return self.op("linear", LinearJob(
            weights=packed.blocks.ctypes.data, bias=None, x=x.ctypes.data, y=y.ctypes.data,
            in_features=packed.in_features, out_features=packed.out_features, y_stride=packed.out_features,
            format=packed.format_id, mode=mode, rows=rows,
        ))  # fmt: skip

    def quantize(self, x: np.ndarray, y: np.ndarray, format: str, rows: int = TOKENS) -> Op:
        job = QuantizeJob(x=x.ctypes.data, y=y.ctypes.data, in_features=x.shape[1], format=FORMATS.index(format))
        job.rows = rows
        self._kept += [x, y]
        return self.op("quantize", job)

    def op(self, name: str, job: ctypes.Structure) -> Op:
        kernel = self.library.kernel(name)
        self._kept += [kernel, job]
        return Op(ctypes.addressof(kernel), ctypes.addressof(job))

    def runner(self, ops: list[Op], rows: int, selected: int) -> Callable[[], object]:
        array = (Op * len(ops))(*ops)
        step = Step(num_tokens=rows, num_rows=1, num_selected=selected)
        count, threads = ctypes.c_int64(len(ops)), ctypes.c_int64(self.threads)
        return lambda: self._run(array, count, ctypes.byref(step), threads, None)

    def measure(self, format: str, shape: tuple[int, int], rows: int) -> Record:
        in_features, out_features = shape
        one = self.weights(format, in_features, out_features)
        copies = [one, *(self.weights(format, *shape) for _ in range(ROTATION_BYTES // one.nbytes))][:400]
        x, y = self.activations(format, in_features, rows), np.zeros((rows, out_features), np.float32)
        if converts_activations(self.library, format):
            self.runner([self.quantize(self.floats(rows, in_features), x, format)], rows, 0)()
        else:
            x[:-64].view(np.float32)[:] = self.floats(rows, in_features).reshape(-1)
        ops = [self.linear(packed, x, y, Mode.STORE) for packed in copies]
        operations = 2 * rows * in_features * out_features
        per_call = max(1, min(len(ops), int(2e10 / operations)))
        calls = [self.runner(ops[i : i + per_call], rows, 0) for i in range(0, len(ops) - per_call + 1, per_call)]
        before = self.machine.read_gb_s(), self.machine.gflop_s()
        found = [t / per_call for _ in range(3) for call in calls[:20] for t in times(call, 1, self.threads)]
        reads, rates = zip(before, (self.machine.read_gb_s(), self.machine.gflop_s()), strict=True)
        floor = max(one.nbytes / max(reads) / 1e9, operations / max(rates) / 1e9)
        shortest = min(found)
        return Record(
            format, f"{in_features}x{out_features}", rows, shortest * 1e6, statistics.median(found) * 1e6,
            one.nbytes / shortest / 1e9, operations / shortest / 1e9, floor * 1e6, shortest / floor,
            max(reads), max(rates),
        )  # fmt: skip

    def model(self, format: str, rows: int, repeat: int) -> Record:
        """All products of SmolLM2-135M; the head computes at most 16 rows."""
        selected, ops, weights = min(rows, 16), [], []
        hidden, up = self.floats(rows, HIDDEN), self.floats(rows, INTERMEDIATE)
        qkv, logits = self.floats(rows, QKV), np.zeros((selected, VOCABULARY), np.float32)
        x_hidden, x_up = (self.activations(format, size, rows) for size in (HIDDEN, INTERMEDIATE))

        def add(packed: PackedWeights, x: np.ndarray, y: np.ndarray, mode: Mode, where: int = TOKENS) -> None:
            if converts_activations(self.library, format):
                buffer = x_hidden if x.shape[1] == HIDDEN else x_up
                ops.append(self.quantize(x, buffer, format, where))
                x = buffer
            ops.append(self.linear(packed, x, y, mode, where))
            weights.append(packed)

        for _ in range(LAYERS):
            add(self.weights(format, HIDDEN, QKV), hidden, qkv, Mode.STORE)
            add(self.weights(format, HIDDEN, HIDDEN), hidden, hidden.copy(), Mode.STORE)
            add(self.weights(format, HIDDEN, INTERMEDIATE, is_gated=True), hidden, up.copy(), Mode.GATED)
            add(self.weights(format, INTERMEDIATE, HIDDEN), up, hidden.copy(), Mode.STORE)
        add(self.weights(format, HIDDEN, VOCABULARY), hidden, logits, Mode.STORE, SELECTED)
        run = self.runner(ops, rows, selected)
        before = self.machine.read_gb_s(), self.machine.gflop_s()
        found = times(run, repeat + 1, self.threads)[1:]
        reads, rates = zip(before, (self.machine.read_gb_s(), self.machine.gflop_s()), strict=True)
        body = sum(w.in_features * w.out_features * (2 if w.is_gated else 1) for w in weights[:-1])
        operations = 2 * (rows * body + selected * HIDDEN * VOCABULARY)
        num_bytes = sum(packed.nbytes for packed in weights)
        floor, shortest = max(num_bytes / max(reads) / 1e9, operations / max(rates) / 1e9), min(found)
        return Record(
            format, "model", rows, shortest * 1e6, statistics.median(found) * 1e6, num_bytes / shortest / 1e9,
            operations / shortest / 1e9, floor * 1e6, shortest / floor, max(reads), max(rates),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "1536x576", "2048x8192"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128, 512])
    parser.add_argument("--model", action="store_true", help="all products of SmolLM2-135M instead of single ones")
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    records = []
    print(f"{'format':9} {'shape':>10} {'rows':>4} {'best us':>9} {'median':>9} {'GB/s':>6} {'GFLOP/s':>8} {'ratio':>6}"
          f"   {kernel_library().isa.name}, {arguments.threads} threads")  # fmt: skip
    for format in arguments.formats:
        for shape in ["model"] if arguments.model else arguments.shapes:
            inputs, outputs = (HIDDEN, VOCABULARY) if shape == "model" else map(int, shape.split("x"))
            if inputs % (256 if format.endswith("K") else 32):
                print(f"{format:9} {shape:>10}: not a multiple of the format's group")
                continue
            for rows in arguments.rows:
                bench = Bench(arguments.threads)
                if arguments.model:
                    r = bench.model(format, rows, arguments.repeat)
                else:
                    r = bench.measure(format, (inputs, outputs), rows)
                records.append(r)
                print(f"{format:9} {shape:>10} {rows:4} {r.best_us:9.1f} {r.median_us:9.1f} {r.gb_s:6.1f} "
                      f"{r.gflop_s:8.1f} {r.ratio:6.2f}   floor: {r.read_gb_s:.0f} GB/s, {r.peak_gflop_s:.0f} GFLOP/s",
                      flush=True)  # fmt: skip
    if arguments.json:
        host = {"isa": kernel_library().isa.name, "threads": arguments.threads, "load": os.getloadavg()}
        arguments.json.write_text(json.dumps({"host": host, "records": [asdict(r) for r in records]}, indent=1))


if __name__ == "__main__":
    main()
