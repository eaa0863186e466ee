"""The commands that the README names, as make would run them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_setup_says_how_much_is_to_come_and_pip_shows_progress() -> None:
    """It was silent for minutes."""
    command = ["make", "--dry-run", "--always-make", "setup"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    before, install, _ = done.stdout.partition("pip install")
    assert "GB to download" in before
    assert "minutes" in before
    line = done.stdout[len(before) + len(install) :].splitlines()[0]
    assert "quiet" not in line
    assert "-q" not in line.split()


def test_ci_says_which_processor_it_ran_on() -> None:
    """The suite passed on one processor and failed on all without AVX512; the record did not show which it was."""
    script = (ROOT / ".ci" / "run").read_text()
    head = script.partition("make setup")[0].replace("exit", "")
    done = subprocess.run(["bash", "-c", _without_installs(head)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    first = done.stdout.splitlines()[0]
    assert first.startswith("processor: ")
    assert "cores" in first
    assert "flags:" in first
    assert "make test-isa" in script


@pytest.mark.parametrize("name", ["Makefile", ".ci/run", "README.md", "CONTRIBUTING.md"])
def test_paths_in_commands_exist(name: str) -> None:
    """A moved test file left `make test-isa` with nothing to run: CI alone noticed."""
    named = re.findall(r"(?<![\w/*.-])(?:tests|src|benchmarks)/[\w/.-]*\w", (ROOT / name).read_text())
    missing = sorted({path for path in named if not (ROOT / path).exists()})
    assert not missing, f"{name} names what does not exist: {missing}"


def _without_installs(head: str) -> str:
    """Only the lines from the options to the processor's."""
    lines = head.splitlines()
    last = next(index for index, line in enumerate(lines) if line.startswith('echo "processor'))
    return "\n".join(line for line in lines[: last + 1] if not line.startswith(("cd ", "exec ")))
