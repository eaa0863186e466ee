"""The layout that docs/design.md promises: no import cycles, no heaps of files, tests where their code is."""

import ast
import fnmatch
import functools
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
MAX_FILES = 20
MAX_LINES = 400


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements below a node, those of functions too; unlike `ast.walk`, which is slow, without expressions."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, name, ()):
            yield child
            yield from statements(child)


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """The project's modules that `path` imports, inside functions or for type checking as well."""
    return all_imports(path) & modules


@functools.cache
def all_imports(path: Path) -> set[str]:
    found = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def folders(*tops: str) -> list[Path]:
    found = [folder for top in tops for folder in [ROOT / top, *(ROOT / top).rglob("*")]]
    return [folder for folder in found if folder.is_dir() and any(folder.glob("*.py"))]


def test_no_module_imports_itself_on_a_way_round() -> None:
    """A cycle hidden in a function is one: each of its modules needs the other to be understood."""
    paths = {module_name(path): path for path in (SRC / "headwater").rglob("*.py")}
    packages = {name for name, path in paths.items() if path.name == "__init__.py"}
    graph = {name: imports_of(path, set(paths)) - packages for name, path in paths.items() if name not in packages}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


TOPS = ("src", "tests", "benchmarks", "integrations")


def test_no_folder_is_a_heap() -> None:
    counts = {
        str(folder.relative_to(ROOT)): len(set(folder.glob("*.py")) - {folder / "__init__.py"})
        for folder in folders(*TOPS)
    }
    heaps = {folder: count for folder, count in counts.items() if count > MAX_FILES}
    assert len(counts) > 100 and not heaps, heaps


def test_no_folder_of_kernels_is_a_heap() -> None:
    counts = {path: len(list(path.glob("*.[ch]"))) for path in (SRC / "headwater").rglob("kernels/**")}
    heaps = {str(path.relative_to(SRC)): count for path, count in counts.items() if count > MAX_FILES}
    assert any(counts.values()) and not heaps, heaps


def test_no_file_of_the_package_is_too_long_to_read() -> None:
    long = {str(path.relative_to(SRC)): n for path in (SRC / "headwater").rglob("*.py")
            if (n := path.read_text().count("\n")) > MAX_LINES}  # fmt: skip
    assert not long, f"above {MAX_LINES} lines: {long}"


def test_tests_lie_where_their_code_does() -> None:
    """Every folder of tests has a folder of the package with its name, but for those of servers, pages and tools."""
    whole = {
        Path(),
        *map(Path, ("e2e", "e2e/adapters", "e2e/answers", "e2e/routers", "e2e/fleet", "e2e/ranks", "e2e/training")),
        *map(Path, ("benchmarks", "pages", "release", "suite")),
    }
    tested = {folder.relative_to(ROOT / "tests") for folder in folders("tests")} - whole
    missing = {str(folder) for folder in tested if not (SRC / "headwater" / folder).is_dir()}
    assert not missing


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports each by its name alone: the second would be an error, seen only where both are collected."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)


def test_engines_that_are_wrong_on_purpose_do_not_ship() -> None:
    """They stay out of the wheel, and no module that ships imports them."""
    excluded = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["exclude"]
    paths = {module_name(path): path for path in (SRC / "headwater").rglob("*.py")}
    left_out = {name for name in paths if any(fnmatch.fnmatch(name, pattern) for pattern in excluded)}
    assert "headwater.simulation.mutants.registry" in left_out
    importers = {name for name in set(paths) - left_out if imports_of(paths[name], set(paths)) & left_out}
    assert not importers
