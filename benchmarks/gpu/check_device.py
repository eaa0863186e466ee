#!/usr/bin/env python3
"""All tests that a GPU computes, in one call, with a report: the contract of devices, runners, the whole engine.

    check_device.py [--out FOLDER] [--workers 8] [--limit-s 300] [--ranks [N]] [--report FILE] [-k EXPRESSION]

Tests run as on a CPU, where Triton's interpreter stands in for the card (tests/conftest.py); golden tests of longer
texts run on a card alone. FOLDER/check_device.json, or FILE, has the outcome of every test, the device and versions.
--ranks: what needs several cards, alone, with servers of N ranks (2).
"""

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# what runs on the card, and the slowest to compile first
TESTS = (
    "tests/execution/test_gpu_golden.py",
    "tests/engine/test_golden_engine.py",
    "tests/engine/test_gpt_oss_on_gpu.py",
    "tests/execution/test_step_graphs.py",
    "tests/execution/test_gpu_runner.py",
    "tests/execution/test_gpu_ranks.py",  # on two cards or more, else skipped
    "tests/devices/test_step_attention.py",
    "tests/devices/test_float8_attention.py",
    "tests/devices/cuda/test_external_attention.py",
    "tests/execution/test_external_steps.py",
    "tests/devices/cuda/test_triton_layers.py",
    "tests/devices/cuda/test_coded_kernels.py",
    "tests/models/quantised/test_quantised_on_gpu.py",
    "tests/devices/cuda/test_expert_kernels.py",
    "tests/devices/cuda/test_cuda_copy.py",
    "tests/devices/cuda/test_head_copy.py",
)
# --ranks: what needs two GPUs or more. Servers of so many ranks on them, one after another
RANK_TESTS = (
    "tests/execution/test_gpu_ranks.py",
    "tests/devices/cuda/test_head_copy.py",
    "tests/e2e/ranks/test_ranks.py",
)


def run_tests(options: argparse.Namespace, xml: Path) -> str:
    """Run pytest within its limit; returns what it said last."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    command += ["--maxfail=8"]  # beyond that it is one cause, and time on a card is dear
    command += ["-W", "default"]  # other versions of the dependencies warn of other things
    command += RANK_TESTS if options.ranks else TESTS  # pytest refuses a file that has moved away
    only_card = "not torch-float32 and not torch-bfloat16 and not native-bfloat16"  # flavours that the CPU computes
    command += ["-k", f"({only_card}) and ({options.k})" if options.k else only_card]
    if importlib.util.find_spec("xdist") is not None and not options.ranks:
        command += ["-n", str(options.workers)]
    # every worker compares with transformers on the CPU: with all cores in each they would only wait for each other
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "2"}
    environment |= {"HEADWATER_TEST_RANKS": str(options.ranks)} if options.ranks else {}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=options.limit_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        told = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return f"{told}\ncut after {options.limit_s:.0f} s"
    return done.stdout + done.stderr


def outcomes(xml: Path) -> dict[str, str]:
    """Test -> passed with the figures it recorded, failed with its reason, or skipped with its reason."""
    found = {}
    for case in ET.parse(xml).iter("testcase") if xml.exists() else ():
        name = f"{case.get('classname')}::{case.get('name')}"
        told = ", ".join(f"{each.get('name')} {each.get('value')}" for each in case.iter("property"))
        found[name] = f"passed: {told}" if told else "passed"
        for kind in ("failure", "error", "skipped"):
            for reason in case.iter(kind):
                found[name] = f"{kind}: {(reason.get('message') or '').strip()[:400]}"
    return found


def device_facts() -> dict[str, str]:
    import torch
    import triton

    if not torch.cuda.is_available():
        raise SystemExit("no GPU: on a CPU run pytest")
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--limit-s", type=float, default=300.0)
    parser.add_argument("--report", type=Path, help="in place of check_device.json in FOLDER")
    parser.add_argument("--ranks", type=int, nargs="?", const=2, default=0, help="the tests of N ranks, alone")
    parser.add_argument("-k", default="", help="pytest's expression")
    options = parser.parse_args(argv)
    facts = device_facts()
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "results.xml"
        told = run_tests(options, xml)
        results = outcomes(xml)
    counts = Counter(result.split(":")[0] for result in results.values())
    path = options.report or options.out / "check_device.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {**facts, "counts": dict(counts), "tests": results}
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(told[-6000:])
    print(f"{facts['device']}, torch {facts['torch']}: {dict(counts)}")
    return 0 if counts["passed"] and not counts["failure"] and not counts["error"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
