"""The commands that the README names, as make would run them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")


def dry_run(target: str, **variables: str) -> str:
    """What make would do for `target` in a fresh clone."""
    clean = {name: value for name, value in os.environ.items() if name not in ("GPU", "EXTRAS", "MAKEFLAGS")}
    command = ["make", "--dry-run", "--always-make", target]
    environment = {**clean, **variables}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@needs_make
@pytest.mark.parametrize(("target", "size"), [("serve", "40 MB to download"), ("test", "GB to download")])
def test_setup_says_how_much_is_to_come_and_pip_shows_progress(target: str, size: str) -> None:
    """It was silent for minutes."""
    commands = dry_run(target, GPU="0")
    before, _, _ = commands.rpartition("pip install")
    assert size in before
    assert "minute" in before
    installs = [line for line in commands.splitlines() if "pip install" in line]
    assert not any("quiet" in line or "-q" in line.split() for line in installs)


@needs_make
@pytest.mark.parametrize(
    ("target", "variables", "extras"),
    [
        ("serve", {"GPU": "0"}, set()),
        ("serve", {"GPU": "1"}, {"gpu"}),
        ("setup", {"GPU": "0", "EXTRAS": "transformers plot"}, {"transformers", "plot"}),
        ("bench", {"GPU": "0"}, {"bench"}),
        ("test-fast", {"GPU": "0"}, {"dev"}),
    ],
)
def test_a_target_installs_what_it_needs_and_no_more(target: str, variables: dict[str, str], extras: set[str]) -> None:
    """`make serve` once brought PyTorch, Triton and node: 2.6 GB for a model of 93 MB."""
    installed = re.findall(r"-m pip install .*-e (\S+)", dry_run(target, **variables))
    assert set(installed) == {"."} | {f"'.[{extra}]'" for extra in extras}


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


@needs_make
@pytest.mark.parametrize(
    ("target", "mark"),
    [
        ("test-gpu", "gpu"),
        ("test-oracles", "oracle"),
        ("test-load", "load"),
        ("test-mutants", "mutants"),
        ("test-random", "random"),
        ("test-isa", "emulated"),
    ],
)
def test_what_make_test_leaves_out_is_run_by_targets_of_its_own_and_by_ci(target: str, mark: str) -> None:
    """A test marked in a folder that its target does not name would be run by nobody."""
    assert mark in _selection("test")[0]
    script = (ROOT / ".ci" / "run").read_text()
    of_ci = target if mark == "emulated" else "test-apart"
    assert re.search(rf"^make {of_ci}\b", script, re.MULTILINE)
    files = list((ROOT / "tests").rglob("test_*.py"))
    marked = [path for path in files if re.search(rf"pytest\.mark\.{mark}\b", path.read_text())]
    assert marked
    for each in (target, of_ci):
        marks, folders = _selection(each)
        assert mark in marks
        assert all(any(path.is_relative_to(folder) for folder in folders) for path in marked)


def _selection(target: str) -> tuple[list[str], list[Path]]:
    """The marks that a target names, and the folders. `make test` names those that it leaves out."""
    commands = dry_run(target, GPU="0").replace("\\\n", " ").splitlines()
    wanted = r'pytest .*-m ("not [^"]+"|\w+)' if target == "test" else r'pytest .*-m ("(?!not)[^"]+"|\w+)'
    ((command, marks),) = [(line, found[1]) for line in commands if (found := re.search(wanted, line))]
    return re.findall(r"\w+", marks), [ROOT / folder for folder in re.findall(r" (tests/\S+)", command)]


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
