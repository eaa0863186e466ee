#!/usr/bin/env python3
"""Checks the kernels of LoRA adapters on a GPU against PyTorch, in each dtype: values, rows without one, equal bits.

check_kernels.py [--out OUT.json]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from headwater.devices.adapters import Adapter, AdapterShape, random_adapter
from headwater.devices.cuda.adapters import CudaAdapters
from headwater.devices.cuda.products.gated_linear import CudaGatedLinear
from headwater.devices.cuda.products.linear import CudaLinear

SITES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
ROWS = (1, 7, 64, 1000)
UNKEPT = {"is_right": False, "what": "rows without an adapter changed"}
ROUNDED = {"float32": 2e-5, "bfloat16": 3e-2}  # where gate and up are products in the dtype, and so is the result
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}  # of the largest number


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    device, results = torch.device("cuda"), []
    for form in TOLERANCE:
        shape = AdapterShape(1, 10, 16, SITES)
        memory = CudaAdapters(shape, form=form, device=device)
        adapters = [random_adapter(shape, rank=16, seed=slot, form=form, scale=2.0) for slot in range(1, 9)]
        for slot, adapter in enumerate(adapters, 1):
            memory.place(slot, memory.prepare(adapter))
        for site in SITES if form == "bfloat16" else ("qkv", "down") if form == "float32" else ("o",):
            for num_rows in ROWS:  # each compiles kernels of its own
                results.append(told(check_site(memory, adapters, site, form=form, num_rows=num_rows)))
        if form != "float16":
            linear = gated_linear(device, form)
            for num_rows in ROWS:
                results += map(told, check_mlp(memory, adapters, linear, form=form, num_rows=num_rows))
    found = {
        "num": len(results),
        "wrong": [it for it in results if not it["is_right"]],
        "other_bits": [f"{it['dtype']} {it['site']} {it['rows']}" for it in results if it["same"] is False],
        "largest_error": {form: max(it["error"] for it in results if it["dtype"] == form) for form in TOLERANCE},
    }
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(bool(found["wrong"]))


def told(it: dict[str, Any]) -> dict[str, Any]:
    print(f"{it['dtype']:9} {it['site']:8} {it['rows']:5} rows: error {it['error']:.1e}"
          f"{'' if it['same'] is None else ', a row alone has equal bits: ' + str(it['same'])}"
          f"{'' if it['is_right'] else '  WRONG'}", flush=True)  # fmt: skip
    return it


def check_site(
    memory: CudaAdapters, adapters: Sequence[Adapter], site: str, *, form: str, num_rows: int
) -> dict[str, Any]:
    """What is added to zeros; rows without an adapter stay zero."""
    num_in, sizes = SITES[site]
    x, slots = inputs(num_rows, num_in, form)
    y = torch.zeros((num_rows, sum(sizes)), device=x.device)
    memory.of_step(slots).add(site, 0, x, y)
    alone = torch.zeros((1, sum(sizes)), device=x.device)
    memory.of_step(slots[-1:]).add(site, 0, x[-1:].contiguous(), alone)
    kept = bool((y[slots == 0] == 0).all())
    return judged(y, added(adapters, site, x, slots), alone, form=form, site=site) | ({} if kept else UNKEPT)


def check_mlp(
    memory: CudaAdapters, adapters: Sequence[Adapter], linear: CudaGatedLinear, *, form: str, num_rows: int
) -> list[dict[str, Any]]:
    """Gate and up with adapters, multiplied; and what down adds to that."""
    num_in, num_out = SITES["gate_up"][0], SITES["down"][0]
    x, slots = inputs(num_rows, num_in, form)
    halves = linear.halves(x).float() + added(adapters, "gate_up", x, slots)
    expected = torch.nn.functional.silu(halves[:, :num_out]) * halves[:, num_out:]
    step, residual = memory.of_step(slots), torch.zeros((num_rows, SITES["down"][1][0]), device=x.device)
    y = step.gated(0, linear, x)
    step.add("down", 0, y, residual)
    of_down = added(adapters, "down", y, slots)
    results = [
        judged(y, expected, None, form=form, site="gated"),
        judged(residual, of_down, None, form=form, site="its down"),
    ]
    results[0]["is_right"] = results[0]["error"] < ROUNDED[form]  # gate and up had been rounded before
    return results


def judged(
    y: torch.Tensor, expected: torch.Tensor, alone: torch.Tensor | None, *, form: str, site: str
) -> dict[str, Any]:
    """`alone`: the last row, computed by itself."""
    error = float((y - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
    same = None if alone is None else bool((alone == y[-1:]).all())
    is_right = error < TOLERANCE[form]
    return {"dtype": form, "site": site, "rows": len(y), "error": error, "same": same, "is_right": is_right}


def inputs(num_rows: int, num_in: int, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows, and the slots of their adapters: every ninth has none."""
    device = torch.device("cuda")
    x = torch.randn((num_rows, num_in), device=device).to(getattr(torch, form))
    return x, torch.arange(num_rows, device=device, dtype=torch.int32) % 9


def added(adapters: Sequence[Adapter], site: str, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """What the adapters add, by PyTorch in float32."""
    y = torch.zeros((len(x), sum(SITES[site][1])), device=x.device)
    for slot, adapter in enumerate(adapters, 1):
        own, first = slots == slot, 0
        for _, each in adapter.at(0, site):
            a, b = (torch.from_numpy(it.to_float32()).to(x.device) for it in (each.a, each.b))
            y[own, first : first + len(b)] = each.scale * (x[own].float() @ a.T) @ b.T
            first += len(b)
    return y


def gated_linear(device: torch.device, form: str) -> CudaGatedLinear:
    num_in, (num_out, _) = SITES["gate_up"]
    weights = (torch.randn((num_out, num_in), device=device) / num_in**0.5 for _ in range(2))
    return CudaGatedLinear(CudaLinear([weight.to(getattr(torch, form)) for weight in weights]))


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    sys.exit(main(sys.argv[1:]))
