#!/usr/bin/env python3
"""A layer of experts on a card: the time of some numbers of tokens, with the tiles in use and with others.

Each figure is the mean of several layers in a CUDA graph, so that no layer's weights are in the cache, beside the bytes
and FLOPs of its products. `library`: both products by torch._grouped_mm, of rows that are in order already.

    experts_run.py MODEL OUT.json [--tokens 1,4,64,1024,8192] [--layers 4]
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from figures import Figures
from roofline import graph_s
from shapes import SHAPES

from headwater.devices.cuda import experts as cuda_experts
from headwater.devices.cuda.experts import CudaExperts
from headwater.devices.cuda.kernels.experts.few import MOST_TOKENS
from headwater.devices.cuda.kernels.experts.grouped import SHAPES as TILES
from headwater.devices.cuda.kernels.experts.grouped import TileShape, tile_shape
from headwater.devices.device import Routing

DEVICE = torch.device("cuda")
MOST_SHARED_BYTES = 220 << 10


def candidates() -> list[TileShape]:
    """Shapes of tiles beside those in use, of which a card may run some faster."""
    found = {shape for _, shape in TILES}
    for rows, features, columns, stages in itertools.product((16, 32, 64, 128), (32, 64, 128), (64, 128), (3, 4)):
        shared = stages * columns * 2 * (rows + 2 * features)
        if rows * features <= 1 << 14 and shared <= MOST_SHARED_BYTES:
            found.add(TileShape(rows, features, columns, 8 if rows * features > 1 << 12 else 4, stages))
    return sorted(found, key=repr)


class Bench:
    """Some layers of one shape, with random weights."""

    def __init__(self, model: str, num_layers: int) -> None:
        shape = SHAPES[model]
        self.num_experts, self.per_token = shape["num_experts"], shape["num_experts_per_tok"]
        self.hidden, self.inner = shape["hidden_size"], shape["moe_intermediate_size"]
        num, hidden, inner = self.num_experts, self.hidden, self.inner
        self.weights = [
            (self._random(num, 2 * inner, hidden), self._random(num, hidden, inner)) for _ in range(num_layers)
        ]
        routing = Routing(self.per_token, renormalises=True)
        self.layers = [CudaExperts(gate_up, down, routing=routing) for gate_up, down in self.weights]

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * 0.02

    def ours_s(self, num_tokens: int) -> float:
        """Seconds of a layer."""
        x, residual = self._random(num_tokens, self.hidden), torch.zeros(num_tokens, self.hidden, device=DEVICE)
        logits = torch.randn(num_tokens, self.num_experts, device=DEVICE)

        def work() -> None:
            for layer in self.layers:
                layer.add_to(residual, x, logits)

        return graph_s(work) / len(self.layers)

    def library_s(self, num_tokens: int) -> float:
        """Seconds of a layer's two products by the library."""
        logits = torch.randn(num_tokens, self.num_experts, device=DEVICE)
        chosen = logits.topk(self.per_token, dim=1).indices.flatten()
        ends = torch.bincount(chosen, minlength=self.num_experts).cumsum(0).to(torch.int32)
        rows, inner = (self._random(num_tokens * self.per_token, size) for size in (self.hidden, self.inner))

        def work() -> None:
            for gate_up, down in self.weights:
                torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)  # pyright: ignore[reportPrivateImportUsage]
                torch._grouped_mm(inner, down.transpose(1, 2), offs=ends)  # pyright: ignore[reportPrivateImportUsage]

        return graph_s(work) / len(self.layers)

    def sizes(self, num_tokens: int) -> tuple[float, float]:
        """Bytes of the weights that so many tokens need, and FLOPs."""
        num_hit = self.num_experts * (1 - (1 - self.per_token / self.num_experts) ** num_tokens)
        weights = 3 * self.hidden * self.inner
        return 2 * weights * num_hit, 2 * weights * num_tokens * self.per_token


def measure(bench: Bench, num_tokens: int, figures: Figures) -> None:
    num_bytes, flops = bench.sizes(num_tokens)
    took_s = bench.ours_s(num_tokens)
    figures.put(f"{num_tokens}_us", took_s * 1e6)
    figures.put(f"{num_tokens}_tb_per_s", num_bytes / took_s / 1e12)
    figures.put(f"{num_tokens}_tflops", flops / took_s / 1e12)
    try:
        figures.put(f"{num_tokens}_library_us", bench.library_s(num_tokens) * 1e6)
    except (RuntimeError, AttributeError) as error:
        figures.put(f"{num_tokens}_library_us", str(error)[:200])
    if num_tokens > MOST_TOKENS:
        try_shapes(bench, num_tokens, figures)


def try_shapes(bench: Bench, num_tokens: int, figures: Figures) -> None:
    used = tile_shape(num_tokens * bench.per_token, bench.num_experts, dtype=torch.bfloat16)
    took: dict[str, float] = {}
    for shape in candidates():
        cuda_experts.tile_shape = lambda *_, shape=shape, **__: replace(shape)  # type: ignore[assignment]
        took[repr(shape)] = bench.ours_s(num_tokens) * 1e6
    cuda_experts.tile_shape = tile_shape
    for name in sorted(took, key=took.__getitem__)[:3]:
        figures.put(f"{num_tokens}_us_{name}", took[name])
    figures.put(f"{num_tokens}_us_in_use_{used!r}", took[repr(used)])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(name for name, shape in SHAPES.items() if "num_experts" in shape))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", default="1,4,16,64,256,1024,8192")
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args(argv)
    figures = Figures(options.out, {"model": options.model, "device": torch.cuda.get_device_name()})
    bench = Bench(options.model, options.layers)
    for num_tokens in map(int, options.tokens.split(",")):
        measure(bench, num_tokens, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
