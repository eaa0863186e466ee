#!/usr/bin/env python3
"""B1 to B4 and a long prompt through `Engine`, with random weights; prints and keeps every figure.

    engine_run.py MODEL OUT.json [--parts B2,B3,B1,B4,long] [--attention-backend fa3] [--kv-cache-dtype fp8_e4m3]
                  [--tp-size 2] [--temperature 1] [--quantization fp8]

`--quantization awq`: random codes of 4 bits with a scale and a zero point for 128 inputs, as AWQ and GPTQ files have,
for all matrices of layers. The server has no such flag: its weights come from files.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from figures import Figures
from shapes import SHAPES, make_model

import workloads
from headwater.devices.cuda.device import CudaDevice
from headwater.devices.cuda.products.coded_matrix import place_codes
from headwater.devices.scaled_tensor import ScaledTensor

STARTED_S = time.perf_counter()  # what is imported above is small


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", default="B2,B3,B1,B4,long")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--quantization", default="none", choices=["none", "int8", "int4", "fp8", "awq"])
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    options = parser.parse_args(argv)
    flags = {
        "device": options.device,
        "attention_backend": options.attention_backend,
        "kv_cache_dtype": options.kv_cache_dtype,
        "tp_size": options.tp_size,
        "quantization": options.quantization,
    }
    if options.quantization == "awq":
        flags["quantization"] = "fp8"
        CudaDevice.rounded = awq_like
    facts = {"model": options.model, "temperature": options.temperature, **flags, "quantization": options.quantization}
    figures = Figures(options.out, facts)
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(options.model, Path(root))
        figures.put("make_folder_s", time.perf_counter() - STARTED_S)
        run(folder, options.parts.split(","), figures, flags, temperature=options.temperature)
    return 0


def awq_like(self: CudaDevice, array: Any) -> Any:
    """In place of the rounding to float8."""
    num_rows, width = array.shape
    groups = array.float().reshape(num_rows, width // 128, 128)
    scales = ((groups.amax(dim=2) - groups.amin(dim=2)) / 15).half().float()
    zeros = (-groups.amin(dim=2) / scales).round().clamp(0, 15)
    codes = ((groups / scales[:, :, None]).round() + zeros[:, :, None]).clamp(0, 15).reshape(num_rows, width // 2, 2)
    pairs = (codes[:, :, 0].to(torch.uint8) | codes[:, :, 1].to(torch.uint8) << 4).cpu().numpy()
    scales, offsets = (each.cpu().numpy() for each in (scales, -zeros * scales))
    tensor = ScaledTensor("int4", (num_rows, width), pairs, scales, tile=(1, 128), offsets=offsets)
    found = place_codes(tensor, array.device)
    assert found.has_zeros
    return found


def run(
    folder: Path, parts: Sequence[str], figures: Figures, flags: dict[str, Any], *, temperature: float
) -> None:
    """All figures of `parts`."""
    before_s = time.perf_counter()
    from headwater import Engine
    from headwater.heap import freeze_heap

    figures.put("import_s", time.perf_counter() - before_s)
    before_s = time.perf_counter()
    is_long = "long" in parts
    with Engine(
        str(folder),
        load_format="dummy",
        **flags,
        context_length=33_024 if is_long else 8192,
        max_running_requests=256,
        log_level="info",
    ) as engine:
        figures.put("engine_start_s", time.perf_counter() - before_s)

        def generate(prompts: workloads.Prompts, lengths: Sequence[int]) -> int:
            fixed = {"temperature": temperature, "ignore_eos": True}
            params = [fixed | {"max_new_tokens": length} for length in lengths]
            answers = engine.generate(input_ids=prompts, sampling_params=params)
            num_tokens = sum(len(answer["output_ids"]) for answer in answers)
            assert num_tokens == sum(lengths), "an answer is short"
            return num_tokens

        def flush() -> None:
            assert engine.flush_cache(timeout=30).success

        generate(workloads.random_prompts(1, 64, seed=1), [1])
        figures.put("start_to_first_answer_s", time.perf_counter() - STARTED_S)
        freeze_heap()  # as docs/api.md advises
        figures.put("kv_tokens", engine.ready.num_pages * engine.ready.page_size)
        workloads.warm_up(generate)
        todo = {
            "B2": lambda: workloads.one_stream(generate, figures.put),
            "B3": lambda: workloads.many_streams(generate, figures.put),
            "B1": lambda: workloads.mixed_lengths(generate, figures.put, flush),
            "B4": lambda: workloads.shared_prefix(generate, figures.put, flush),
            "long": lambda: workloads.long_prompt(generate, figures.put, length=32_768),
        }
        for part in parts:
            todo[part]()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
