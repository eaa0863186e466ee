#!/usr/bin/env python3
"""Checks the kernels of LoRA adapters on a GPU against PyTorch, in each dtype: values, rows without one, equal bits.

    check_kernels.py [--out OUT.json]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from headwater.devices.adapters import AdapterShape, random_adapter
from headwater.devices.cuda.adapters import CudaAdapters

SITES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}  # of the largest number


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    device, results = torch.device("cuda"), []
    for form, tolerance in TOLERANCE.items():
        dtype = getattr(torch, form)
        shape = AdapterShape(1, 10, 16, SITES)
        memory = CudaAdapters(shape, form=form, device=device)
        adapters = [random_adapter(shape, rank=16, seed=slot, form=form, scale=2.0) for slot in range(1, 9)]
        for slot, adapter in enumerate(adapters, 1):
            memory.place(slot, memory.prepare(adapter))
        for site in SITES if form == "bfloat16" else ("qkv", "down") if form == "float32" else ("o",):
            num_in, sizes = SITES[site]
            for num_rows in (1, 7, 64, 1000):  # each compiles kernels of its own
                x = torch.randn((num_rows, num_in), device=device).to(dtype)
                slots = torch.arange(num_rows, device=device, dtype=torch.int32) % 9
                y = torch.zeros((num_rows, sum(sizes)), device=device)
                memory.of_step(slots).add(site, 0, x, y)
                expected = torch.zeros_like(y)
                for slot, adapter in enumerate(adapters, 1):
                    own, first = slots == slot, 0
                    for _, each in adapter.at(0, site):
                        a, b = (torch.from_numpy(it.to_float32()).to(device) for it in (each.a, each.b))
                        expected[own, first : first + len(b)] = each.scale * (x[own].float() @ a.T) @ b.T
                        first += len(b)
                error = float((y - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
                alone = torch.zeros((1, sum(sizes)), device=device)
                memory.of_step(slots[-1:]).add(site, 0, x[-1:].contiguous(), alone)
                same = bool((alone == y[-1:]).all())
                kept = bool((y[slots == 0] == 0).all())
                is_right = error < tolerance and kept
                results.append(
                    {"dtype": form, "site": site, "rows": num_rows, "error": error, "same": same, "is_right": is_right}
                )
                print(f"{form:9} {site:8} {num_rows:5} rows: error {error:.1e}, a row alone has equal bits: {same}"
                      f"{'' if is_right else '  WRONG'}", flush=True)  # fmt: skip
    found = {
        "num": len(results),
        "wrong": [it for it in results if not it["is_right"]],
        "other_bits": [f"{it['dtype']} {it['site']} {it['rows']}" for it in results if not it["same"]],
        "largest_error": {form: max(it["error"] for it in results if it["dtype"] == form) for form in TOLERANCE},
    }
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    sys.exit(main(sys.argv[1:]))
