"""docs/threads.md: the tests that it names as proofs exist, and every row has one."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROOF = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
THREAD = re.compile(r"\[[^]]*#(\d+)\]\(https://github\.com/[\w.-]+/[\w.-]+/(?:issues|pull|discussions)/(\d+)\)")


def rows() -> list[list[str]]:
    lines = (ROOT / "docs/threads.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| [")]
    assert len(cells) > 40, "the rows are not where this test looks for them"
    return cells


@functools.cache
def functions_in(name: str) -> set[str]:
    """The test functions of all files of that name: folders may change."""
    return {
        node.name
        for path in (ROOT / "tests").rglob(name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_every_row_has_threads_a_rule_and_tests_that_exist() -> None:
    missing: list[str] = []
    for row in rows():
        threads, wrong, rule, proofs = row
        assert THREAD.findall(threads), row
        assert all(label == number for label, number in THREAD.findall(threads)), f"a label names another thread: {row}"
        assert len(wrong) > 10
        assert len(rule) > 10
        named = PROOF.findall(proofs)
        assert len(named) == proofs.count("`") // 2 > 0, f"a test that is not written as `file.py::test`: {row}"
        missing += [f"{file}::{test}" for file, test in named if test not in functions_in(file)]
    assert not missing
