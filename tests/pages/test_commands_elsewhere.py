"""The list of commands that the tests of the pages do not run is true: each entry is needed, and runs where it says."""

import re
from pathlib import Path

import pytest
from page_commands import ELSEWHERE, PAGES, ROOT, PageCommand, console_blocks, why_elsewhere


def all_commands() -> list[PageCommand]:
    return [command for page in PAGES for block in console_blocks(page) for command in block]


def test_each_reason_is_that_of_a_command() -> None:
    """A reason that no command needs any more would hide the next one."""
    for page, start, why in ELSEWHERE:
        found = [c for c in all_commands() if re.fullmatch(page, c.page) and re.match(start, c.text)]
        assert found, f"no command of {page} begins with {start}: {why}"
    assert sum(why_elsewhere(command) is None for command in all_commands()) > 80


def test_the_tests_that_pages_name_are_there() -> None:
    """Their commands run in `make test`, under the names that the pages give."""
    named = [c.text for c in all_commands() if "-m pytest" in c.text]
    assert len(named) >= 2
    for command in named:
        paths = [ROOT / word for word in command.split() if word.startswith("tests")]
        assert paths, command
        assert all(path.exists() for path in paths), command
        files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))]
        for name in re.findall(r"-k (\w+)", command):
            assert any(f"def {name}(" in file.read_text() for file in files), command


@pytest.mark.parametrize("folder", [ROOT / "integrations"])
def test_what_the_pages_of_clients_show_is_what_their_scripts_run(folder: Path) -> None:
    """The packages of an installation, and the options of programs that a script starts with ports of its own."""
    sources = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    for command in all_commands():
        if not command.page.startswith("docs/clients/") or command.page.endswith("index.md"):
            continue
        words = re.findall(r"(?<![\w=])--?[a-z][\w-]+", command.text.partition(" #")[0])
        if re.match(r"(?:pip|npm) install", command.text):
            words = re.findall(r"[@\w/-]{3,}(?=[\[='\s]|$)", command.text)[2:]
        ours = {"--no-deps", "--port", "--kv-events-endpoint", "-o", "-m", "--key"}
        if why_elsewhere(command) == "integrations/run.py runs the blocks of this page as they stand":
            continue
        missing = [word for word in words if word not in ours and word.split("==")[0] not in sources]
        assert not missing, f"{command}: no script of integrations/ has {missing}"
