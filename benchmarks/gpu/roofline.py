#!/usr/bin/env python3
"""The card's best rates: copies on the device, matrix products, pinned copies in each direction, a step's products.

From these rates it derives the bounds for a long prompt, to compare with the prefill rate and decode step of
engine_run.py.

    roofline.py OUT.json
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import Figures
from shapes import SHAPES, kv_token_bytes, prefill_flops, weight_bytes

DEVICE = torch.device("cuda")
GIB = 1 << 30
LONG_PROMPT = 32_768


def median_s(work: Callable[[], object], *, repeat: int = 7) -> float:
    """Seconds on the device."""
    work()
    times = []
    for _ in range(repeat):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        work()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) / 1e3)
    return statistics.median(times)


def graph_s(work: Callable[[], object]) -> float:
    """Seconds of one run in a CUDA graph."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return median_s(graph.replay)


def memory(figures: Figures) -> None:
    source = torch.empty(4 * GIB, dtype=torch.uint8, device=DEVICE).random_(0, 255)
    target = torch.empty_like(source)
    figures.put("device_copy_read_and_write_tb_per_s", 2 * 4 * GIB / median_s(lambda: target.copy_(source)) / 1e12)


def products(figures: Figures) -> None:
    for m, n, k in ((8192, 8192, 8192), (8192, 28672, 4096), (8192, 6144, 1024)):
        a = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
        b = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
        took_s = median_s(lambda a=a, b=b: torch.nn.functional.linear(a, b))
        figures.put(f"matmul_{m}x{n}x{k}_tflops", 2 * m * n * k / took_s / 1e12)


def pinned_copies(figures: Figures) -> None:
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(GIB, dtype=torch.uint8, device=DEVICE)
    figures.put(
        "pinned_to_device_gb_per_s", GIB / median_s(lambda: device.copy_(host, non_blocking=True)) / 1e9
    )
    figures.put("pinned_to_host_gb_per_s", GIB / median_s(lambda: host.copy_(device, non_blocking=True)) / 1e9)


def products_of_a_step(figures: Figures) -> None:
    """All projections of one decode step in a CUDA graph: the library's own floor."""
    for name in ("qwen3-0.6b", "llama3.1-8b"):
        shape = SHAPES[name]
        hidden, inner, head_dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
        q = shape["num_attention_heads"] * head_dim
        kv = shape["num_key_value_heads"] * head_dim
        sizes = [(q + 2 * kv, hidden), (hidden, q), (2 * inner, hidden), (hidden, inner)]
        layers = [
            [torch.randn(size, device=DEVICE, dtype=torch.bfloat16) for size in sizes]
            for _ in range(shape["num_hidden_layers"])
        ]
        head = torch.randn(shape["vocab_size"], hidden, device=DEVICE, dtype=torch.bfloat16)
        for num_rows in (1, 64, 256):
            inputs = [torch.randn(num_rows, size[1], device=DEVICE, dtype=torch.bfloat16) for size in sizes]

            def step(inputs=inputs, layers=layers, head=head) -> None:
                for layer in layers:
                    for weight, x in zip(layer, inputs, strict=True):
                        torch.nn.functional.linear(x, weight)
                torch.nn.functional.linear(inputs[0], head)

            figures.put(f"{name}_products_of_a_step_of_{num_rows}_ms", graph_s(step) * 1e3)
        del layers, head
        torch.cuda.empty_cache()


def long_prompt(figures: Figures) -> None:
    """No engine is faster than this: products at the best measured rate, every byte read once at the copy's."""
    flops_per_s = max(value for name, value in figures.values.items() if name.startswith("matmul_")) * 1e12
    bytes_per_s = figures.values["device_copy_read_and_write_tb_per_s"] * 1e12
    for name in ("qwen3-0.6b", "llama3.1-8b"):
        figures.put(
            f"{name}_long_{LONG_PROMPT}_prefill_tokens_per_s_at_most",
            LONG_PROMPT * flops_per_s / prefill_flops(name, LONG_PROMPT),
        )
        num_bytes = weight_bytes(name) + LONG_PROMPT * kv_token_bytes(name)
        figures.put(f"{name}_long_{LONG_PROMPT}_ms_per_token_at_least", num_bytes / bytes_per_s * 1e3)


def main() -> int:
    figures = Figures(Path(sys.argv[1]), {"device": torch.cuda.get_device_name(), "torch": torch.__version__})
    started_s = time.perf_counter()
    for part in (memory, products, pinned_copies, products_of_a_step, long_prompt):
        part(figures)
        torch.cuda.empty_cache()
    figures.put("took_s", time.perf_counter() - started_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
