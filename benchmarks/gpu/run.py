#!/usr/bin/env python3
"""All GPU benchmarks, the most valuable first, each in a process and within a limit of its own.

    run.py FOLDER [--parts qwen,llama,...] [--limit-s 560] [--ranks]

--ranks: the parts for two GPUs, beside one of them. Every part writes FOLDER/PART.json as it goes. A part whose file
says that it is complete is left out, so a run that was cut short goes on where it was. At the end all figures are in
FOLDER/summary.json with date and commit.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
# part -> (script, arguments before and after the output file, seconds at most)
PARTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], int]] = {
    "roofline": ("roofline.py", (), (), 60),
    "qwen": ("engine_run.py", ("qwen3-0.6b",), ("--parts", "B2,B3,B1,B4"), 150),
    "llama": ("engine_run.py", ("llama3.1-8b",), ("--parts", "B2,B3,B1,B4"), 180),
    "copies": ("page_copies.py", (), (), 60),
    "tiers": ("tiers_run.py", ("llama3.1-8b",), (), 180),
    "flush": ("flush_run.py", ("llama3.1-8b",), (), 180),
    "http_qwen": ("http_run.py", ("qwen3-0.6b",), (), 120),
    "http_llama": ("http_run.py", ("llama3.1-8b",), (), 120),
    "grammars": ("grammar_run.py", ("llama3.1-8b",), (), 240),
    "speculation": ("../speculation/gpu_speculation.py", ("llama3.1-8b",), (), 240),
    "coded": ("coded_run.py", (), (), 300),
    "llama_fp8": ("engine_run.py", ("llama3.1-8b",), ("--parts", "B2,B3,B1", "--quantization", "fp8"), 180),
    "llama_int4": ("engine_run.py", ("llama3.1-8b",), ("--parts", "B2,B3,B1", "--quantization", "int4"), 480),
    "experts": ("experts_run.py", ("qwen3-30b-a3b",), (), 150),
    "moe": ("engine_run.py", ("qwen3-30b-a3b",), ("--parts", "B2,B3,B1"), 240),
    "long": ("engine_run.py", ("llama3.1-8b",), ("--parts", "long"), 90),
}
EIGHT_B, SEVENTY_B, TWO = ("llama3.1-8b",), ("llama3.1-70b",), ("--tp-size", "2")
RANK_PARTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], int]] = {
    "tp2_llama": ("engine_run.py", EIGHT_B, ("--parts", "B2,B3,B4,B1", *TWO), 130),
    "tp1_llama": ("engine_run.py", EIGHT_B, ("--parts", "B2,B3,B4,B1"), 110),
    "tp2_copies": ("rank_copies.py", (), (), 70),
    "tp2_70b": ("engine_run.py", SEVENTY_B, ("--parts", "B2,B3", *TWO), 120),
    "tp2_tiers": ("tiers_run.py", EIGHT_B, ("--parts", "hits", "--chats", "32", *TWO), 90),
    "tp2_flush": ("flush_run.py", EIGHT_B, ("--rounds", "1", *TWO), 70),
    "tp1_tiers": ("tiers_run.py", EIGHT_B, ("--parts", "hits", "--chats", "32"), 70),
    "tp1_flush": ("flush_run.py", EIGHT_B, ("--rounds", "1"), 60),
}
ALL_PARTS = PARTS | RANK_PARTS


def run_part(name: str, folder: Path, limit_s: float) -> None:
    script, before, after, own_limit_s = ALL_PARTS[name]
    out = folder / f"{name}.json"
    command = [sys.executable, str(HERE / script), *before, str(out), *after]
    started_s = time.perf_counter()
    print(f"--- {name}", flush=True)
    try:
        code = subprocess.run(command, timeout=min(own_limit_s, limit_s), check=False).returncode
        outcome = "complete" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired as error:
        outcome = f"cut after {error.timeout:.0f} s"
    figures = json.loads(out.read_text()) if out.exists() else {}
    figures |= {"outcome": outcome, "took_s": round(time.perf_counter() - started_s, 1)}
    out.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"--- {name}: {outcome}, {figures['took_s']} s", flush=True)


def is_complete(path: Path) -> bool:
    return path.exists() and json.loads(path.read_text()).get("outcome") == "complete"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts")
    parser.add_argument("--ranks", action="store_true", help="on two GPUs")
    parser.add_argument("--limit-s", type=float, default=3600.0)
    parser.add_argument("--commit", default="", help="what was measured, where git cannot tell")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    end_s = time.monotonic() + options.limit_s
    parts = options.parts.split(",") if options.parts else list(RANK_PARTS if options.ranks else PARTS)
    for name in parts:
        remaining_s = end_s - time.monotonic()
        if remaining_s > 15 and not is_complete(options.folder / f"{name}.json"):
            run_part(name, options.folder, remaining_s)
    now = datetime.datetime.now(datetime.UTC)
    summary = {"date": now.isoformat(timespec="seconds"), "commit": options.commit}
    summary |= {path.stem: json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))
                if path.stem in ALL_PARTS}  # fmt: skip
    (options.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return 0 if all(is_complete(options.folder / f"{name}.json") for name in parts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
