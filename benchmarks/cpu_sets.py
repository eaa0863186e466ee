#!/usr/bin/env python3
"""Products of the CPU kernels on several instruction sets, side by side in alternating rounds.

    cpu_sets.py [--sets avx512_bf16 avx512_amx ...] [--variants PIECE=9 ...] [--formats Q4_1] [--shapes 576x960 ...]
                [--rows 16 512] [--threads N] [--check]

A shape is INPUTSxOUTPUTS. Each cell is the best of the rounds in Gop/s (a multiplication and an addition are two
operations); weights rotate through copies, as many as a model has layers, up to 96 MB. A variant is the last set with
other constants (`NAME = number` in the sources of the products; several of one variant are joined by commas).
`--check` compares instead, at odd shapes of bfloat16 and each quantised format: rows alone with the same rows in a
batch, bit by bit, and the sets with each other, where it gives the relative error.
"""

import argparse
import ctypes
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headwater.devices.cpu import kernel_build
from headwater.devices.cpu.kernel_build import INSTRUCTION_SETS, compile_library, usable_instruction_sets
from headwater.devices.cpu.kernel_library import TOKENS, KernelLibrary, Op, Step
from headwater.devices.cpu.linear_kernels import LinearJob, Mode, QuantizeJob
from headwater.devices.cpu.packed_weights import FORMATS, activation_bytes, converts_activations

SHAPES = ("576x960", "576x576", "576x3072", "1536x576", "2048x8192", "4096x4096", "14336x4096")
MOST_COPIES, MOST_BYTES, ROUNDS = 30, 96 << 20, 5
MOST_CHECKED = 300  # rows
SOURCES = ("linear/*.c", "run.c", "pool.c", "machine/pin.c")  # what a product needs
CHECKED = FORMATS[1:2] + FORMATS[3:]  # those that some set computes in tiles


def build(names: Sequence[str], variants: Sequence[str], folder: Path) -> dict[str, KernelLibrary]:
    """The libraries of the sets and of the variants of the last one, with the kernels of products alone."""
    original = kernel_build.SOURCES

    def build_one(name: str) -> tuple[str, KernelLibrary]:
        isa = INSTRUCTION_SETS[name if name in names else names[-1]]
        sources = original
        if name not in names:
            sources = folder / re.sub(r"\W", "_", name)
            shutil.copytree(original, sources)
            for path in sources.rglob("linear/*.[ch]"):
                path.write_text(with_constants(path.read_text(), name))
        output = folder / f"{re.sub(r'[^a-z0-9]', '_', name.lower())}.so"
        files = sorted(path for pattern in SOURCES for path in sources.glob(pattern))
        include = [f"-I{sources}", f"-I{sources / 'linear'}", f"-I{sources / 'simd'}"]
        compile_library(isa, output, sources=files, compiler=["gcc", *isa.options, *include])
        return name, KernelLibrary(output, isa)

    with ThreadPoolExecutor() as pool:
        return dict(pool.map(build_one, [*names, *variants]))


def with_constants(text: str, variant: str) -> str:
    for each in variant.split(","):
        name, value = each.split("=")
        text = re.sub(rf"\b{name}( =|) \d+\b", rf"{name}\1 {value}", text)
    return text


class Products:
    """Random weights and activations of a shape, and the ops that multiply them on one set."""

    def __init__(self, library: KernelLibrary, format: str, shape: tuple[int, int], rows: int, copies: int) -> None:
        rng = np.random.default_rng(0)
        in_features, out_features = shape
        blocks = -(-out_features // 16)
        block_bytes = library.functions.hw_block_bytes
        block_bytes.restype = ctypes.c_int64
        size = blocks * block_bytes(ctypes.c_int64(FORMATS.index(format)), ctypes.c_int64(in_features))
        random = rng.integers(0, 60, size, dtype=np.uint8)  # finite in each format
        self._weights = [random.copy() for _ in range(copies)]
        self._floats = rng.normal(size=(rows, in_features)).astype(np.float32)
        self._x = np.zeros(rows * activation_bytes(library, format, in_features) + 64, np.uint8)
        x = self._x.ctypes.data + -self._x.ctypes.data % 64
        self.y = np.zeros((rows, out_features), np.float32)
        self._library, self._step = library, Step(num_tokens=rows, num_rows=1)
        self._kept: list[object] = []
        if converts_activations(library, format):
            quantize = QuantizeJob(self._floats.ctypes.data, x, in_features, FORMATS.index(format), TOKENS)
            self._run([self._op("quantize", quantize)], 1)
        else:
            x = self._floats.ctypes.data
        self._ops = [
            self._op("linear", LinearJob(
                weights=weights.ctypes.data, bias=None, x=x, y=self.y.ctypes.data, in_features=in_features,
                out_features=out_features, y_stride=out_features, format=FORMATS.index(format), mode=Mode.STORE,
                rows=TOKENS,
            ))
            for weights in self._weights
        ]  # fmt: skip
        self.operations = 2 * rows * in_features * out_features * copies

    def _op(self, name: str, job: ctypes.Structure) -> Op:
        kernel = self._library.kernel(name)
        self._kept += [kernel, job]
        return Op(ctypes.addressof(kernel), ctypes.addressof(job))

    def _run(self, ops: list[Op], threads: int) -> None:
        array = (Op * len(ops))(*ops)
        self._library.functions.hw_run(ctypes.addressof(array), len(ops), ctypes.byref(self._step), threads, None)

    def run(self, threads: int) -> npt.NDArray[np.float32]:
        self._run(self._ops, threads)
        return self.y

    def seconds(self, threads: int) -> float:
        began = time.perf_counter()
        self._run(self._ops, threads)
        return time.perf_counter() - began


def compare(libraries: dict[str, KernelLibrary], arguments: argparse.Namespace) -> None:
    print(f"{'Gop/s':8} {'shape':>10} {'rows':>5}", *(f"{name:>14}" for name in libraries))
    for format in arguments.formats:
        for shape in arguments.shapes:
            in_features, out_features = map(int, shape.split("x"))
            if in_features % (256 if format.endswith("K") else 32):
                continue
            copies = max(1, min(MOST_COPIES, MOST_BYTES // (in_features * out_features * 5 // 8)))
            for rows in arguments.rows:
                size = (in_features, out_features)
                products = [Products(each, format, size, rows, copies) for each in libraries.values()]
                seconds = [[each.seconds(arguments.threads) for each in products] for _ in range(ROUNDS)]
                best = [product.operations / min(times) / 1e9
                        for product, times in zip(products, zip(*seconds, strict=True), strict=True)]  # fmt: skip
                print(f"{format:8} {shape:>10} {rows:5}", *(f"{each:14.0f}" for each in best), flush=True)


def check(libraries: dict[str, KernelLibrary], threads: int) -> int:
    """How many rows have other bits alone than in a batch. Prints how far the sets are from the first one."""
    failures = 0
    for format in CHECKED:
        worst = dict.fromkeys(libraries, 0.0)
        for shape in ((256, 1), (768, 33), (2304, 100), (8192, 40)):
            results = {}
            for name, library in libraries.items():
                whole = Products(library, format, shape, MOST_CHECKED, 1).run(threads)
                for rows in (1, 2, 5, 15, 16, 17, 31, 32, 33, 97):
                    part = Products(library, format, shape, rows, 1).run(threads)  # the first rows of the same numbers
                    if not np.array_equal(part.view(np.uint32), whole[:rows].view(np.uint32)):
                        failures += 1
                        print(f"DIFFERS: {name} {format} {shape}, {rows} rows alone and of {MOST_CHECKED}: "
                              f"{(part != whole[:rows]).mean():.1%} of the results")  # fmt: skip
                results[name] = whole
            first = next(iter(results.values()))
            for name, y in results.items():
                worst[name] = max(worst[name], float(np.sqrt(((y - first) ** 2).mean() / (first**2).mean())))
        print(format, *(f"{name}: {error:.1e}" for name, error in worst.items()), sep="  ")
    print(f"{failures} rows with other bits alone than in a batch")
    return failures


def main() -> int:
    usable = [isa.name for isa in usable_instruction_sets()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=usable[::-1], choices=usable)
    parser.add_argument("--variants", nargs="*", default=[])
    parser.add_argument("--formats", nargs="+", default=["Q4_1"], choices=FORMATS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        libraries = build(arguments.sets, arguments.variants, Path(folder))
        if arguments.check:
            return check(libraries, arguments.threads)
        compare(libraries, arguments)
        return 0


if __name__ == "__main__":
    sys.exit(main())
