#!/usr/bin/env python3
"""All GPU benchmarks, the most valuable first, each in a process and within a limit of its own.

    run.py FOLDER [--parts qwen,llama,...] [--limit-s 560] [--cards 4] [--dry-run]

--cards: the parts for 2, 4 or 8 GPUs of one host, beside fewer of them (ranks/rank_parts.py); `--trial` runs them on a
CPU with a tiny model. --dry-run prints the parts, their commands and limits. Every part writes FOLDER/PART.json as it
goes. A part whose file says that it is complete is left out, so a run that was cut short goes on where it was. After
each part all figures are in FOLDER/summary.json with date and commit.
"""

import argparse
import contextlib
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "ranks"))
from rank_parts import CARDS, Part, conclusions, rank_parts

HERE = Path(__file__).resolve().parent
GRACE_S = 3.0
PARTS: dict[str, Part] = {
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


def command_of(part: Part, out: Path) -> list[str]:
    script, before, after, _ = part
    return [sys.executable, str(HERE / script), *before, str(out), *after]


def run_part(name: str, part: Part, folder: Path, limit_s: float) -> None:
    """Run a part in a process of its own, which is ended with all that it started if it takes too long."""
    out, own_limit_s = folder / f"{name}.json", part[3]
    started_s = time.perf_counter()
    print(f"--- {name}", flush=True)
    process = subprocess.Popen(command_of(part, out), start_new_session=True)
    try:
        code = process.wait(timeout=min(own_limit_s, limit_s))
        outcome = "complete" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired as error:
        outcome = f"cut after {error.timeout:.0f} s"
    finally:
        end_session(process)
    figures = json.loads(out.read_text()) if out.exists() else {}
    figures |= {"outcome": outcome, "took_s": round(time.perf_counter() - started_s, 1)}
    out.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"--- {name}: {outcome}, {figures['took_s']} s", flush=True)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End what a part left behind: a server or ranks would keep the cards' memory from the next part."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
            time.sleep(GRACE_S if process.poll() is None else 0.2)
    process.wait()


def is_complete(path: Path) -> bool:
    return path.exists() and json.loads(path.read_text()).get("outcome") == "complete"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts")
    parser.add_argument("--cards", type=int, choices=CARDS, help="the parts for so many GPUs of one host")
    parser.add_argument("--ranks", action="store_const", const=2, dest="cards", help="the same as --cards 2")
    parser.add_argument("--trial", action="store_true", help="with --cards: on this CPU, with a tiny model")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    parser.add_argument("--limit-s", type=float, default=3600.0)
    parser.add_argument("--commit", default="", help="what was measured, where git cannot tell")
    options = parser.parse_args(argv)
    known = PARTS if options.cards is None else rank_parts(options.cards, is_trial=options.trial)
    parts = options.parts.split(",") if options.parts else list(known)
    if unknown := [name for name in parts if name not in known]:
        parser.error(f"--parts has {', '.join(unknown)}; known are {', '.join(known)}")
    if options.dry_run:
        for name in parts:
            command = shlex.join(command_of(known[name], options.folder / f"{name}.json")[1:])
            print(f"{name}, at most {known[name][3]} s: {command}")
        print(f"{len(parts)} parts, at most {sum(known[name][3] for name in parts)} s")
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    end_s = time.monotonic() + options.limit_s
    for name in parts:
        remaining_s = end_s - time.monotonic()
        if remaining_s > 15 and not is_complete(options.folder / f"{name}.json"):
            run_part(name, known[name], options.folder, remaining_s)
            write_summary(options.folder, known, commit=options.commit)
    write_summary(options.folder, known, commit=options.commit)
    return 0 if all(is_complete(options.folder / f"{name}.json") for name in parts) else 1


def write_summary(folder: Path, known: Mapping[str, Part], *, commit: str) -> None:
    """All figures so far, with what they say together."""
    now = datetime.datetime.now(datetime.UTC)
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem in known}
    summary = {"date": now.isoformat(timespec="seconds"), "commit": commit, **conclusions(found), **found}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
