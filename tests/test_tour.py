"""docs/tour.md leads somewhere: every file, class and function that it names exists, and the sizes are true."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/headwater"
TOUR = (ROOT / "docs/tour.md").read_text()
NAME = re.compile(r"`([A-Za-z_][\w./]*)`")
STEP = re.compile(r"^\| \d+ \| ([^|]*) \|", re.MULTILINE)
FIRST = re.compile(r"^\| `([\w/]+\.py)` \| (\d+) \|", re.MULTILINE)


def defined_in(path: Path) -> set[str]:
    """The functions and classes of a file, methods as `Class.method`."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]
    inner = {
        f"{node.name}.{part.name}" for node in top if isinstance(node, ast.ClassDef)
        for part in node.body if isinstance(part, kinds)
    }  # fmt: skip
    return inner | {node.name for node in top}


def test_every_step_names_a_file_and_what_is_in_it() -> None:
    steps, missing = STEP.findall(TOUR), []
    assert len(steps) >= 40, "the steps are not where this test looks for them"
    for step in steps:
        known: set[str] | None = None
        for name in NAME.findall(step):
            if name.endswith(".py"):
                path = SOURCE / name
                known = defined_in(path) if path.exists() else None
                missing += [name] if known is None else []
            elif known is not None and name not in known:
                missing.append(name)
        assert "`" in step
    assert not missing


def test_classes_and_methods_named_in_the_text_exist() -> None:
    """`EngineLoop.turn` in a sentence, wherever it is defined."""
    known = {name for path in SOURCE.rglob("*.py") for name in defined_in(path)}
    named = [name for name in NAME.findall(TOUR) if re.fullmatch(r"[A-Z]\w+(\.\w+)?", name)]
    assert len(named) > 40
    assert not [name for name in named if name not in known]


def test_the_files_to_read_first_have_the_lines_that_are_promised() -> None:
    promised = {name: int(count) for name, count in FIRST.findall(TOUR)}
    found = {name: len((SOURCE / name).read_text().splitlines()) for name in promised}
    assert len(promised) >= 6
    assert {name: count for name, count in found.items() if abs(count - promised[name]) > 0.2 * count} == {}
    assert 1500 <= sum(found.values()) <= 1900, "the page and README.md promise 1,700"


def test_the_size_that_the_readme_gives_is_true() -> None:
    match = re.search(r"about ([\d,]+) lines of Python in (\d+) files", (ROOT / "README.md").read_text())
    assert match, "README.md says how large the package is"
    files = list(SOURCE.rglob("*.py"))
    num_lines = sum(len(path.read_text().splitlines()) for path in files)
    for said, found in ((match[1], num_lines), (match[2], len(files))):
        assert abs(int(said.replace(",", "")) - found) < 0.15 * found, f"README.md says {said}, there are {found}"
