#!/usr/bin/env python3
"""A GRPO run by trl on a CPU: the trainer and a Headwater server as two processes, weights pushed after every step.

    make training                                  # once: .venv-training, with trl
    python integrations/training/grpo_on_cpu.py    # in the environment of `make dev`; a minute on two cores

The reward of a toy task must rise, every rollout's log-probabilities must agree with the trainer's own, and the trainer
must send nothing but what a step needs. The record and its picture go to integrations/results/grpo-trl.{json,png}.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from grpo_report import plot, problems, save, summary  # noqa: E402
from tiny_policy import write_tiny_policy  # noqa: E402

from record import RESULTS, commit  # noqa: E402
from servers import ServerProcess, free_port  # noqa: E402

PYTHON_VARIABLE = "HEADWATER_TRAINING_PYTHON"
PYTHON = Path(os.environ.get(PYTHON_VARIABLE) or HERE.parents[1] / ".venv-training" / "bin" / "python")
SOURCE = HERE.parents[1] / "src"
SERVER_ARGUMENTS = ("--dtype", "float32", "--max-total-tokens", "8192", "--log-level", "warning")
LIMIT_S = 600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-save", action="store_true", help="keep no record")
    args = parser.parse_args()
    if not PYTHON.exists():
        parser.error(f"no environment with trl: run `make training`, or set {PYTHON_VARIABLE}")
    with tempfile.TemporaryDirectory(prefix="headwater-grpo-") as folder:
        write_tiny_policy(Path(folder) / "model")
        serve = ("-m", "headwater", "serve", "--model", f"{folder}/model", *SERVER_ARGUMENTS)
        with ServerProcess(*serve) as server:
            server.wait_healthy()
            report = train(server.url, Path(folder), num_steps=args.steps)
    found = problems(report, num_steps=args.steps)
    print(json.dumps(summary(report), indent=1))
    print("\n".join(found) or "as it must be")
    if not args.no_save:
        save(report, RESULTS / "grpo-trl.json", commit=commit(), versions=versions(), problems=found)
        plot(report, RESULTS / "grpo-trl.png", title="GRPO with trl on a CPU, rollouts by Headwater")
    return 1 if found else 0


def train(url: str, folder: Path, *, num_steps: int, learning_rate: float = 4e-3) -> dict[str, Any]:
    """The report of grpo_trainer.py, run against the server at `url`. CalledProcessError with what it printed last."""
    report = folder / "report.json"
    command = [PYTHON, HERE / "grpo_trainer.py", "--url", url, "--model", folder / "model", "--report", report]
    paths = HERE / "stand_ins", SOURCE  # the stand-in calls NCCL as the server does
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1", "HOME": str(folder),
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",  # so small a model gains nothing by more, and the server needs a core
    }  # fmt: skip
    ran = subprocess.run(
        [*map(str, command), *map(str, ("--steps", num_steps, "--learning-rate", learning_rate)),
         "--group-port", str(free_port())],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    if ran.returncode != 0:
        raise RuntimeError(f"the trainer ended with {ran.returncode}:\n{ran.stderr[-3000:]}")
    return json.loads(report.read_text())


def versions() -> dict[str, str]:
    code = "import sys; from importlib.metadata import version\nfor name in sys.argv[1:]: print(version(name))"
    names = ["trl", "transformers", "torch", "accelerate", "datasets"]
    found = subprocess.run([str(PYTHON), "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, found.stdout.split(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
