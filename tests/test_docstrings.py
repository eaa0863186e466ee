"""Docstrings and comments read easily: plain words, short sentences. The pages have the same rules (test_prose.py)."""

import ast
import inspect
import io
import re
import tokenize

from test_layout import statements
from test_prose import BANNED, LIST_ITEM, MAX_WORDS, ROOT, num_words, plain, sentences

SOURCE = ROOT / "src" / "headwater"
AREAS = [ROOT / "benchmarks", ROOT / "integrations", SOURCE]
FILES = sorted(file for area in AREAS for file in area.rglob("*.py"))
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# a part of each banned expression: only a source with one behind a # is cut into tokens, which takes seconds for all
SUSPICIOUS = re.compile(r"tell|told|body|whoever|whomever|spoil|lets?\s+go|letting\s+go|such\s+as\s+are|,\s+too", re.I)


def docstrings(source: str) -> list[str]:
    tree = ast.parse(source)
    found = [ast.get_docstring(node) for node in (tree, *statements(tree)) if isinstance(node, DOCUMENTED)]
    return [text for text in found if text]


def comments(source: str) -> list[str]:
    """All comments of a source that has a suspicious one."""
    if not any(SUSPICIOUS.search(line.partition("#")[2]) for line in source.splitlines() if "#" in line):
        return []
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]


def blocks(docstring: str) -> list[str]:
    """Paragraphs and list items, without code and tables, which are indented or begin with `|`."""
    found, was_item = [""], False
    for line in inspect.cleandoc(docstring).splitlines():
        if not line.strip() or line.startswith("|") or (line.startswith("    ") and not was_item):
            found.append("")
            was_item = False
        elif item := LIST_ITEM.match(line):
            found.append(line[item.end() :])
            was_item = True
        else:
            found[-1] += " " + line.strip()
    return [block for block in found if block.strip()]


def faults(source: str) -> list[str]:
    """A line for each fault of a Python file; empty for a good one."""
    texts = docstrings(source)
    found = [
        f"{num_words(sentence)} words: {sentence}"
        for text in texts
        for block in blocks(text)
        for sentence in sentences(block)
        if num_words(sentence) > MAX_WORDS
    ]
    return found + [
        f"`{bad[0]}`: {' '.join(text.split())}"
        for text in [*texts, *comments(source)]
        for bad in BANNED.finditer(plain(re.sub(r"\s+", " ", text)))
    ]


def test_every_area_has_files() -> None:
    """A folder that was renamed must not leave the check."""
    for area in AREAS:
        assert any(file.is_relative_to(area) for file in FILES)


def test_every_file_reads_easily() -> None:
    found = [f"{file.relative_to(ROOT)}: {fault}" for file in FILES for fault in faults(file.read_text())]
    assert not found, "\n".join(found)


def test_each_fault_is_found() -> None:
    """In all docstrings and comments, across lines; code that is shown, tables and other strings are left out."""
    long = "very " * 40 + "long"
    assert faults(f'"""It is {long}."""') == [f"43 words: It is {long}."]
    assert faults(f'class A:\n    def f():\n        """It is.\n\n        It is {long}.\n        """') != []
    assert faults(f'"""As follows:\n\n    {long}\n\n| {long} |\n\n- one\n- {"very " * 30}\n- {"very " * 30}\n"""') == []
    assert faults('"""The loop\ntold it."""') == ["`told`: The loop told it."]
    assert faults("count = 1  # of this, too") == ["`, too`: of this, too"]
    for banned in ("tell", "telling", "told", "somebody", "Nobody", "whoever", "whomever", "spoilt", "such as are",
                   "lets  go", "let\tgo", "letting go"):  # fmt: skip
        assert faults(f'name = "#"  # {banned}')
    assert faults('"""See `told`."""\nname = "somebody"') == []
