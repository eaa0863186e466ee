#!/usr/bin/env python3
"""LoRA adapters on a GPU in one call: kernels against PyTorch, served text against PEFT with a reload, throughput.

    check_lora.py [OUT.json] [--parts kernels,text,speed] [--shape llama3.1-8b] [--device cuda]

Each part is a process with a limit of its own, so that a fault of one does not hide the others. The last line printed
is the report as JSON. Nothing is fetched and no model file is needed: all weights are random.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CASES = ("16x1000", "64x1000", "2048+0")
GOAL = 0.85
LIMIT_S = {"kernels": 75, "speed": 100, "text": 120}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--parts", default=",".join(LIMIT_S))
    parser.add_argument("--shape", default="llama3.1-8b")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts.split(","):
            out = Path(folder) / f"{part}.json"
            report[part] = run_part(command(part, out, options), out, limit_s=LIMIT_S[part])
    speeds = {it["case"]: it["share"] for it in report.get("speed", {}).get("found") or ()}
    report["is_right"] = all(part["rc"] == 0 for part in report.values())
    report["shares_below_goal"] = {case: share for case, share in speeds.items() if share < GOAL}
    text = json.dumps(report, indent=1) + "\n"
    if options.out is not None:
        options.out.write_text(text)
    print(json.dumps(report))
    return 0 if report["is_right"] else 1


def command(part: str, out: Path, options: argparse.Namespace) -> list[str]:
    """What runs a part, which writes its figures to `out`."""
    if part == "kernels":
        return ["check_kernels.py", "--out", str(out)]
    if part == "text":
        return ["check_text.py", str(out), "--device", options.device]
    model = ["--shape", options.shape, "--device", options.device]
    return ["lora.py", *model, "--rank", "16", "--case", *CASES, "--repeat", "3", "--kernels", "--out", str(out)]


def run_part(arguments: Sequence[str], out: Path, *, limit_s: float) -> dict[str, Any]:
    """The figures of a part, its exit status (124: cut) and seconds; what it said last if it failed."""
    started_s = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / arguments[0]), *arguments[1:]],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_s, check=False,
        )  # fmt: skip
        rc, told = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        rc, told = 124, error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
    print(told[-3000:], flush=True)
    found = json.loads(out.read_text()) if out.exists() else None
    report = {"rc": rc, "took_s": round(time.perf_counter() - started_s, 1), "found": found}
    return report | ({"told": told[-3000:]} if rc else {})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
