"""Every command of a console of README.md and docs/ runs, on one server.

tests/page_commands.py lists the commands that run elsewhere or nowhere, each with the reason. A new command of a page
is run here unless it is listed there.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_shell import PageShell
from running_server import RunningServer

from page_commands import (
    ELSEWHERE,
    PAGES,
    ROOT,
    STARTS_SERVER,
    PageCommand,
    console_blocks,
    is_dear,
    why_elsewhere,
)

BLOCKS = [
    block
    for page in PAGES
    for commands in console_blocks(page)
    if not any(STARTS_SERVER.match(command.text) for command in commands)
    and (block := [command for command in commands if not why_elsewhere(command) and not is_dear(command)])
]
STORE = ("--enable-hierarchical-cache", "--hicache-storage-backend", "file", "--hicache-storage-dir")

needs_tools = pytest.mark.skipif(shutil.which("curl") is None, reason="the pages' commands use curl")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> PageShell:
    return PageShell.make(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def page_server(shell: PageShell) -> Iterator[RunningServer]:
    """With all tiers and the metrics of all of them, as the pages show."""
    options = ("--model", str(shell.model), "--dtype", "float32", "--max-total-tokens", "8192", *STORE)
    with RunningServer(*options, str(shell.folder / "store")) as server:
        yield server.wait_healthy()


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """Of commands that several pages show."""
    return {}


@pytest.mark.slow
@needs_tools
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: str(block[0]))
def test_the_commands_of_a_console_succeed(
    block: list[PageCommand], shell: PageShell, page_server: RunningServer, answers: dict[str, Any]
) -> None:
    """A renamed option or route, a parameter that is gone, a file that was moved: the page is wrong."""
    for command in block:
        if command.text.startswith("headwater top"):
            code = shell.run_in_terminal(command.text, url=page_server.url, until="tokens", keys="q")
            assert code == 0, command
            continue
        done = answers.get(command.text) or shell.run(command.text, url=page_server.url)
        if "headwater doctor" in command.text:
            answers[command.text] = done  # it measures the machine, for a second
        if command.text.endswith("# prints nothing"):
            assert not done.stdout, f"{command}\n{done.stdout}"
            continue
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        is_quiet = re.match(r"curl -f .*/ready$|python ", command.text)
        assert done.stdout.strip() or is_quiet, f"{command} printed nothing"
        if "release_memory_occupation" in command.text:
            assert page_server.post("/resume_memory_occupation", json={}).status_code == 200


def all_commands() -> list[PageCommand]:
    return [command for page in PAGES for block in console_blocks(page) for command in block]


def test_each_reason_is_that_of_a_command() -> None:
    """A reason that no command needs any more would hide the next one."""
    for page, start, why in ELSEWHERE:
        found = [c for c in all_commands() if re.fullmatch(page, c.page) and re.match(start, c.text)]
        assert found, f"no command of {page} begins with {start}: {why}"
    assert len(BLOCKS) > 30


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
