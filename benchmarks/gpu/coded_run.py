#!/usr/bin/env python3
"""Products with weights of 4 and 8 bits on a card: right, and how near to the memory's speed.

Figures are for each matrix of an 8B model, each kind of codes and each number of tokens. A time is that of a CUDA
graph over several copies of the matrix, so that none is in the cache. Beside it stand that of bfloat16, and the bytes
of codes read a second. Results are compared with plain products of the same numbers first; a wrong one ends the run.

    coded_run.py OUT.json [--tokens 1,2,4,8,16,32,64,128,512,4096] [--kinds awq,q4_0,q8_0,int8,float8,float8_blocks]
                 [--size 4096]
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from figures import Figures
from roofline import graph_s

from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.kernels.coded.numbers import to_numbers
from headwater.devices.cuda.products.coded_matrix import CodedMatrix, place_codes
from headwater.devices.device import Linear
from headwater.devices.scaled_tensor import ScaledTensor

DEVICE = torch.device("cuda")
# codes, inputs that share a scale (0: all), outputs that share one, offsets
KINDS = {
    "awq": ("int4", 128, 1, True),
    "q4_0": ("int4", 32, 1, False),
    "q8_0": ("int8", 32, 1, False),
    "int8": ("int8", 0, 1, False),
    "float8": ("float8_e4m3fn", 0, 1, False),
    "float8_blocks": ("float8_e4m3fn", 128, 128, False),
}
COPIES_BYTES = 400 << 20  # of one matrix in all: more than the card's cache


def shapes(size: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of an 8B model's layers for 4096."""
    return {"qkv": (size * 3 // 2, size), "o": (size, size), "gate_up": (7 * size, size), "down": (size, size * 7 // 2)}


def random_tensor(kind: str, shape: tuple[int, int]) -> ScaledTensor:
    form, group, high, has_offsets = KINDS[kind]
    rng = np.random.default_rng(0)
    tile = (high, group or shape[1])
    tiles = (-(-shape[0] // high), -(-shape[1] // tile[1]))
    scales = rng.uniform(1e-3, 2e-3, size=tiles).astype(np.float16).astype(np.float32)
    offsets = -rng.integers(0, 16, size=tiles).astype(np.float32) * scales if has_offsets else None
    codes = rng.integers(0, 120, size=(shape[0], shape[1] // (2 if form == "int4" else 1))).astype(np.uint8)
    if form == "int8":
        codes = codes.view(np.int8)
    return ScaledTensor(form, shape, codes, scales, tile=tile, offsets=offsets)  # type: ignore[arg-type]


def each(layers: Sequence[Linear], x: torch.Tensor) -> Callable[[], object]:
    return lambda: [layer(x) for layer in layers]


def check(matrix: CodedMatrix, linear: Linear, x: torch.Tensor, name: str) -> None:
    expected = F.linear(x.float(), to_numbers(matrix, torch.float32))
    found = linear(x).float()
    error = ((found - expected).norm() / expected.norm()).item()
    is_rounded = matrix.format == "float8_e4m3fn" and len(x) > 1
    assert error < (0.05 if is_rounded else 0.01), f"{name}: relative error {error}"


def run(figures: Figures, *, kinds: Sequence[str], tokens: Sequence[int], size: int) -> None:
    device = CudaDevice(DEVICE)
    for which, shape in shapes(size).items():
        num_copies = max(2, COPIES_BYTES // (shape[0] * shape[1] // 2))
        plain = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) / 64 for _ in range(max(2, num_copies // 4))]
        inputs = {num: torch.randn((num, shape[1]), device=DEVICE, dtype=torch.bfloat16) for num in tokens}
        beside = [device.pack_linear([weight]) for weight in plain]
        plain_us = {num: graph_s(each(beside, x)) / len(beside) * 1e6 for num, x in inputs.items()}
        for num, took_us in plain_us.items():
            figures.put(f"{which}_bfloat16_{num}_us", took_us)
        for kind in kinds:
            tensor = random_tensor(kind, shape)
            matrices = [place_codes(tensor, DEVICE) for _ in range(num_copies)]
            layers, matrix = [device.pack_linear([one]) for one in matrices], matrices[0]
            num_bytes = sum(tensor.nbytes for tensor in matrix.tensors())
            for num, x in inputs.items():
                name = f"{which}_{kind}_{num}"
                check(matrix, layers[0], x, name)
                took_us = graph_s(each(layers, x)) / num_copies * 1e6
                figures.put(f"{name}_us", took_us)
                figures.put(f"{name}_tb_per_s", num_bytes / took_us / 1e6)
                figures.put(f"{name}_of_bfloat16", took_us / plain_us[num])
            del layers, matrices, matrix
            torch.cuda.empty_cache()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,512,4096")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--size", type=int, default=4096, help="hidden size")
    options = parser.parse_args(argv)
    tokens = [int(num) for num in options.tokens.split(",")]
    figures = Figures(options.out, {"device": torch.cuda.get_device_name(DEVICE), "size": options.size})
    run(figures, kinds=options.kinds.split(","), tokens=tokens, size=options.size)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
