"""The pages are true: links and paths lead somewhere, the index lists every page, and code is the code."""

import ast
import difflib
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "headwater"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks" / "README.md"])
LINK = re.compile(r"\]\(\s*([^)\s]+)\s*\)")
PATH = re.compile(r"`([\w./-]+/[\w.-]+\.(?:py|md|json|toml|c|h))(?:::\w+)?`")


def text_of(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", text_of(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower())
        found.add(plain.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken: list[str] = []
    for target in LINK.findall(text_of(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or (anchor and other.suffix == ".md" and anchor not in anchors(other)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page: Path) -> None:
    """`scheduling/plan.py` is a file of the package, `benchmarks/tiers.py` one of the repository."""
    if page.name == "CHANGELOG.md":  # names what was there then
        return
    roots = (ROOT, SOURCE, SOURCE.parent, page.parent)
    named = PATH.findall(text_of(page))
    assert not [path for path in named if not any((root / path).exists() for root in roots)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_in_python_exist(page: Path) -> None:
    """`python -m headwater.x` has a module, `python benchmarks/x.py` a file; when these move, the pages follow."""
    modules = re.findall(r"python -m (headwater[\w.]*)", page.read_text())
    scripts = re.findall(r"python ([\w/]+\.py)", page.read_text())
    files = [SOURCE.parent / (module.replace(".", "/") + ".py") for module in modules]
    assert not [file for file in files + [ROOT / script for script in scripts] if not file.exists()]


def test_the_mutants_of_the_page_are_those_of_the_code() -> None:
    """What each breaks is its docstring: `python -m headwater.simulation.mutants.check` prints the page's table."""
    broken: set[str | None] = set()
    for file in (SOURCE / "simulation" / "mutants").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "mutant" in {
                call.func.id
                for call in node.decorator_list
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
            }:
                broken.add(ast.get_docstring(node))
    rows = re.findall(r"^\| (.*?) \| \w+ \| `\w+` \|", (ROOT / "docs" / "mutants.md").read_text(), re.MULTILINE)
    assert len(rows) > 100
    assert set(rows) == broken


@pytest.mark.parametrize("folder", ["docs", "docs/clients"])
def test_the_index_lists_every_page(folder: str) -> None:
    index = ROOT / folder / "index.md"
    listed = set(LINK.findall(index.read_text()))
    assert {page.name for page in (ROOT / folder).glob("*.md")} - {"index.md"} <= listed


def test_the_turn_in_the_design_is_the_one_in_the_loop() -> None:
    """The page shows the one method in which all state changes; it once left out what the method does."""
    design = (ROOT / "docs" / "design.md").read_text()
    blocks: list[str] = re.findall(r"^```python\n(.*?)^```", design, re.DOTALL | re.MULTILINE)
    (shown,) = [block for block in blocks if "def turn" in block]
    text = (SOURCE / "engine" / "loop.py").read_text()
    (loop,) = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "EngineLoop"]
    (turn,) = [node for node in loop.body if isinstance(node, ast.FunctionDef) and node.name == "turn"]
    code = textwrap.dedent("\n".join(text.splitlines()[turn.lineno - 1 : turn.end_lineno])) + "\n"
    diff = "".join(difflib.unified_diff(shown.splitlines(True), code.splitlines(True), "docs/design.md", "loop.py"))
    assert not diff, f"docs/design.md shows another `turn` than engine/loop.py has:\n{diff}"
